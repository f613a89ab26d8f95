"""Files read and written by a thread while a device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """Reads items by number; a thread reads the next item while this one is used.

    Args:
        read: what gives an item; its errors appear where the item is asked for.
        count: how many there are.
        ahead: use a thread; else every item is read when it is asked for, and one is in memory at a time.
    """

    def __init__(self, read: Callable[[int], Item], count: int, ahead: bool) -> None:
        self.read, self.count = read, count
        self._pool = ThreadPoolExecutor(1, "headfuse-read") if ahead else None
        self._next: tuple[int, Future[Item]] | None = None

    def __call__(self, index: int) -> Item:
        """Return the item, and start to read the next one."""
        if self._pool is None:
            return self.read(index)
        known, self._next = self._next, None
        item = known[1].result() if known is not None and known[0] == index else self.read(index)
        if index + 1 < self.count:
            self._next = index + 1, self._pool.submit(self.read, index + 1)
        return item


class InTurn:
    """Runs pieces of work one after another, optionally in a thread.

    Args:
        thread: use one; else work is done when it is given.
    """

    def __init__(self, thread: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "headfuse-write") if thread else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> InTurn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True)

    def __call__(self, work: Callable[[], None]) -> None:
        """Do the work after the previous piece; errors of the previous piece are raised here."""
        self.wait()
        if self._pool is None:
            work()
        else:
            self._pending = self._pool.submit(work)

    def wait(self) -> None:
        """Wait for the last piece of work."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def together(work: Callable[[Item], str], items: Iterable[Item]) -> list[str]:
    """The results of the same work on several items, by as many threads as the library takes."""
    with ThreadPoolExecutor(thread_name_prefix="headfuse-hash") as pool:
        return list(pool.map(work, items))
