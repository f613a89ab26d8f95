"""Times of rivals that take turns, in pairs within one run: these machines are noisy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def paired(rivals: dict[str, Callable[[], object]], steps: int) -> dict[str, list[float]]:
    """Seconds of each rival in `steps` rounds, in which they take turns; two rounds more go first.

    Times of this thread, which does all the work: those of other processes do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    for _ in range(steps + 2):
        for name in order:
            start = time.thread_time()
            rivals[name]()
            times[name].append(time.thread_time() - start)
        order.reverse()
    return {name: seconds[2:] for name, seconds in times.items()}


def ratio(times: dict[str, list[float]], name: str, over: str) -> float:
    """Median of the quotients of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(times[name], times[over], strict=True))


def milliseconds(seconds: list[float]) -> float:
    """Median."""
    return 1e3 * statistics.median(seconds)
