"""Shows the stages of a command on stderr: a live bar on a terminal, elsewhere a line per stage and per minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console

LINE_SECONDS = 60.0
"""Longest time in seconds without a line, if the output is no terminal."""


class Report(Protocol):
    """Receives a stage, its progress in words, and the share that is done, if known."""

    def __call__(self, stage: str, state: str = "", share: float | None = None) -> None:
        """Show it."""


@contextmanager
def stages(console: Console, first: str) -> Iterator[Report]:
    """Show the stages of what runs inside, from the one named `first` on; a quiet console shows nothing."""
    if is_live(console) and not console.quiet:
        with _live(console, first) as report:
            yield report
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
    """Whether the console can rewrite a line. FORCE_COLOR makes rich call a log a terminal."""
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


@contextmanager
def _live(console: Console, first: str) -> Iterator[Report]:
    """A bar for the current stage, removed at the end."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[state]}")
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as bar:
        task, current = bar.add_task(first, total=None, state=""), first

        def report(stage: str, state: str = "", share: float | None = None) -> None:
            nonlocal current
            if stage != current:
                current = stage
                bar.reset(task, description=stage, state=state, total=None if share is None else 1.0)
            bar.update(task, completed=share or 0.0, total=None if share is None else 1.0, state=state)

        yield report


class _Lines:
    """A line where a stage begins, and again after `LINE_SECONDS` without one."""

    def __init__(self, console: Console) -> None:
        self._console, self._began, self._last = console, time.monotonic(), 0.0
        self._stage, self._state, self._lock = "", "", threading.Lock()
        self._start: tuple[float, float] | None = None
        self._left = ""

    def __call__(self, stage: str, state: str = "", share: float | None = None) -> None:
        with self._lock:
            begins, self._stage, self._state = stage != self._stage, stage, state
            if begins:
                self._start = None
            self._left = self._time_left(share)
            if begins:
                self._print()

    def keep_on(self, ended: threading.Event) -> None:
        while not ended.wait(max(0.0, self._last + LINE_SECONDS - time.monotonic())):
            with self._lock:
                if time.monotonic() >= self._last + LINE_SECONDS:
                    self._print()

    def _time_left(self, share: float | None) -> str:
        """Time left in the stage at its average speed so far, in words."""
        if share is None:
            return ""
        now = time.monotonic()
        if self._start is None:
            self._start = now, share
        began, first = self._start
        return f", {_clock((now - began) * (1 - share) / (share - first))} left" if share > first else ""

    def _print(self) -> None:
        self._last = time.monotonic()
        state = f": {self._state}" if self._state else ""
        took = _clock(self._last - self._began)
        self._console.print(f"{self._stage}{state} ({took}{self._left})", highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
