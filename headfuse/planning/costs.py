"""What keeping each number of heads costs, from several measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headfuse.plan import HeadBudget
from headfuse.planning.allocators import Rows

TINY = 1e-30


@dataclass(frozen=True)
class CostTable:
    """What keeping 1 to n heads costs in every layer, `[layers][n]` for keys and for values."""

    key: Rows
    value: Rows

    @property
    def rows(self) -> Rows:
        """The key side of every layer, then the value side, `[2 layers][n]`."""
        return [*self.key, *self.value]

    def of(self, budget: HeadBudget) -> float:
        """What a budget costs; more heads never cost more than fewer."""
        counts = zip(self.rows, (*budget.key_heads, *budget.value_heads), strict=True)
        return sum(min(row[:count]) for row, count in counts)

    @property
    def pairs(self) -> Rows:
        """Keys and values of a layer together, `[layers][n]`."""
        both = zip(self.key, self.value, strict=True)
        return [[k + v for k, v in zip(keys, values, strict=True)] for keys, values in both]


def cost_row(lost: Sequence[float], measured: Sequence[tuple[float, Mapping[int, float]]]) -> list[float]:
    """What keeping 1 to n key heads or value heads of a layer costs `[n]`: the weighted mean of the measurements.

    Args:
        lost: the closed form's lost energy of every count, `[n]`.
        measured: each a weight, and the cost of some counts, 0 for n.
    """
    total = sum(weight for weight, _ in measured)
    rows = [[weight / total * c for c in _between(lost, costs)] for weight, costs in measured]
    return [sum(costs) for costs in zip(*rows, strict=True)]


def measured_counts(heads: int, every: bool) -> list[int]:
    """The counts below all `heads` of a side whose cost is measured: powers of two, or every one."""
    return [count for count in range(1, heads) if every or count & (count - 1) == 0]


def _between(lost: Sequence[float], measured: Mapping[int, float]) -> list[float]:
    """Measured costs; at counts that were not measured, the lost energy scaled like the nearest measured counts
    (mathematics.md section 8.5).
    """
    scale = {c: math.log((cost + TINY) / (lost[c - 1] + TINY)) for c, cost in measured.items() if cost > 0}
    costs = []
    for count, energy in enumerate(lost, start=1):
        if count in measured or not scale:
            costs.append(measured.get(count, energy))
            continue
        below = max((c for c in scale if c <= count), default=min(scale))
        above = min((c for c in scale if c >= count), default=max(scale))
        share = 0.0 if above == below else (count - below) / (above - below)
        costs.append((energy + TINY) * math.exp(scale[below] * (1 - share) + scale[above] * share))
    return costs
