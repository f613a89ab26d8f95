"""ALLOCATORS: how a number of heads is divided among rows. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Rows = Sequence[Sequence[float]]
"""`[rows][n]`: cost of keeping 1 to n heads."""
Choices = Sequence[Sequence[int]]
"""`[rows]`: the head counts that each row of costs may have, ascending."""
SHRINKAGE = 0.5
"""How far `shrinkage` moves costs towards their mean (docs/experiments/shrinkage.md)."""
Choose = Callable[[int, Choices, Rows | None], list[int]]


@dataclass(frozen=True)
class Allocator:
    """How head counts are chosen, and from which costs.

    `choose` spends `total` heads on rows whose choices enclose it, fewer only where no choice makes use of the rest.
    """

    choose: Choose
    costs: Literal["none", "measured", "importance"]
    """What the cost table holds: the measured cost of fusing, or the importance of single heads (importance.py)."""
    reads_search: bool = False
    """Method dha passes the distances that its search learned instead of measured costs."""
    candidates: tuple[str, ...] = ()
    """Others that it stands for: the plan is the first one's, and with wide heads that of the one which loses least,
    but the last one's unless another one's loses less beyond doubt (comparison.py).
    """


def uniform(total: int, choices: Choices, costs: Rows | None = None) -> list[int]:
    """Equal counts for all rows; a remainder goes to the first rows, so to keys before values."""
    counts = [row[0] for row in choices]
    left = total - sum(counts)
    for level in sorted(set[int]().union(*choices)):
        for index, row in enumerate(choices):
            step = level - counts[index]
            if level in row and 0 < step <= left:
                counts[index] = level
                left -= step
    return counts


def least_cost(total: int, choices: Choices, costs: Rows | None = None) -> list[int]:
    """The counts of least total cost, by exact dynamic programming over the table (mathematics.md section 8.6).

    Of plans that cost the same, one with the most heads.
    """
    if costs is None:
        raise ValueError("the least cost needs a cost table")
    best = [0.0] + [math.inf] * total
    chosen: list[list[int]] = []
    for costs_of, allowed in zip(costs, choices, strict=True):
        falling = list(itertools.accumulate(costs_of, min))  # more heads never cost more
        new, choice = [math.inf] * (total + 1), [0] * (total + 1)
        for used in range(allowed[0], total + 1):
            for count in allowed:
                if count > used:
                    break
                value = best[used - count] + falling[count - 1]
                if value < new[used]:
                    new[used], choice[used] = value, count
        best = new
        chosen.append(choice)
    counts, used = [], min(range(total + 1), key=lambda used: (best[used], -used))
    for choice in reversed(chosen):
        counts.append(choice[used])
        used -= choice[used]
    return counts[::-1]


def shrinkage(total: int, choices: Choices, costs: Rows | None = None) -> list[int]:
    """The counts of least total cost, by costs that are `shrunk`."""
    if costs is None:
        raise ValueError("shrinkage needs a cost table")
    return least_cost(total, choices, shrunk(costs))


def shrunk(costs: Rows) -> list[list[float]]:
    """Every row of costs halfway to the mean of all rows.

    Costs are measured on little text, and differ between rows by chance, too: a mean of many is nearer to the truth
    than each of them (James and Stein, 1961). Rows that cost the same get equal counts.
    """
    means = [sum(column) / len(costs) for column in zip(*costs, strict=True)]
    return [[(1 - SHRINKAGE) * own + SHRINKAGE * mean for own, mean in zip(row, means, strict=True)] for row in costs]


def dha_greedy(total: int, choices: Choices, costs: Rows | None = None) -> list[int]:
    """Give every row the fewest heads, then shares of n/2, n/4, n/8, ... where the loss per head is largest.

    The loss of a row is its cost of keeping one head; a share raises a row to its size, and the last ones are single
    heads (DHA, arXiv 2406.06567, appendix B.4, which names a dynamic programme and describes this greedy). The paper
    caps the large shares without a number: here each size may spend half of what is left.
    """
    if costs is None:
        raise ValueError("the greedy needs a cost table")
    counts = [row[0] for row in choices]
    left, share = total - sum(counts), max(row[-1] for row in choices) // 2
    while left > 0:
        spendable = left if share <= 1 else left // 2
        before = left
        for index in sorted(range(len(counts)), key=lambda i: (-costs[i][0] / counts[i], i)):
            more = [c for c in choices[index] if counts[index] < c <= counts[index] + spendable]
            level = min(more, default=0) if share <= 1 else max((c for c in more if c <= share), default=0)
            if level:
                spendable, left = spendable - (level - counts[index]), left - (level - counts[index])
                counts[index] = level
        if share <= 1 and left == before:
            break
        share //= 2
    return counts


ALLOCATORS: dict[str, Allocator] = {
    "auto": Allocator(least_cost, "measured", candidates=("sensitivity", "shrinkage", "uniform")),
    "uniform": Allocator(uniform, "none"),
    "dha-greedy": Allocator(dha_greedy, "measured", reads_search=True),
    "sensitivity": Allocator(least_cost, "measured"),
    "shrinkage": Allocator(shrinkage, "measured"),
    "taylor": Allocator(least_cost, "importance"),
    "shapley": Allocator(least_cost, "importance"),
}
