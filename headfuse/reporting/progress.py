"""The stages of a command on stderr: a live line on a terminal; elsewhere a plain line each, and one a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

LINE_SECONDS = 60.0
"""The longest silence in a log that is no terminal."""
Report = Callable[[str, str], None]
"""Takes a stage and how far it is."""


@contextmanager
def stages(console: Console, first: str) -> Iterator[Report]:
    """Show the stages of what runs inside, from the one named `first` on; a quiet console shows nothing."""
    if is_live(console):
        with console.status(first) as status:
            yield lambda stage, state: status.update(f"{stage}: {state}")
        return
    lines, ended = _Lines(console), threading.Event()
    lines(first, "")
    thread = threading.Thread(target=lines.keep_on, args=(ended,), daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()


def is_live(console: Console) -> bool:
    """Whether a line can be written again and again."""
    return console.is_terminal and not console.is_dumb_terminal


class _Lines:
    """A line where a stage begins, and again after `LINE_SECONDS` without one."""

    def __init__(self, console: Console) -> None:
        self._console, self._began, self._last = console, time.monotonic(), 0.0
        self._stage, self._state, self._lock = "", "", threading.Lock()

    def __call__(self, stage: str, state: str) -> None:
        with self._lock:
            begins, self._stage, self._state = stage != self._stage, stage, state
            if begins:
                self._print()

    def keep_on(self, ended: threading.Event) -> None:
        while not ended.wait(max(0.0, self._last + LINE_SECONDS - time.monotonic())):
            with self._lock:
                if time.monotonic() >= self._last + LINE_SECONDS:
                    self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        minutes, seconds = divmod(round(self._last - self._began), 60)
        state = f": {self._state}" if self._state else ""
        self._console.print(f"{self._stage}{state} ({minutes}:{seconds:02d})", highlight=False, soft_wrap=True)
