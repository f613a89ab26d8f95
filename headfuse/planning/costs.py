"""What keeping each number of heads costs, from several measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headfuse.fusion.maps import HeadMaps
from headfuse.plan import Groups

TINY = 1e-30


@dataclass(frozen=True)
class SideCosts:
    """What keeping 1 to n key heads or value heads of a layer costs.

    `lost [n]` is the closed form's lost energy; `maps` has maps and groups of those counts below n that are to be
    measured; each of `measured` is a weight, and the cost of some counts, 0 for n.
    """

    lost: list[float]
    maps: dict[int, tuple[HeadMaps, Groups]]
    measured: list[tuple[float, dict[int, float]]]

    def row(self) -> list[float]:
        """The row of the cost table `[n]`, the weighted mean of the measurements."""
        total = sum(weight for weight, _ in self.measured)
        rows = [[weight / total * c for c in _between(self.lost, costs)] for weight, costs in self.measured]
        return [sum(costs) for costs in zip(*rows, strict=True)]


def measured_counts(heads: int, every: bool) -> list[int]:
    """The counts below all `heads` of a side whose cost is measured: powers of two, or every one."""
    return [count for count in range(1, heads) if every or count & (count - 1) == 0]


def _between(lost: list[float], measured: dict[int, float]) -> list[float]:
    """Measured costs where there are any; elsewhere the lost energy, scaled like the nearest measured counts."""
    scale = {c: math.log((cost + TINY) / (lost[c - 1] + TINY)) for c, cost in measured.items() if cost > 0}
    costs = []
    for count, energy in enumerate(lost, start=1):
        below = max((c for c in scale if c <= count), default=None)
        above = min((c for c in scale if c >= count), default=below)
        if count in measured or below is None or above is None:
            costs.append(measured.get(count, energy))
            continue
        share = 0.0 if above == below else (count - below) / (above - below)
        costs.append((energy + TINY) * math.exp(scale[below] * (1 - share) + scale[above] * share))
    return costs
