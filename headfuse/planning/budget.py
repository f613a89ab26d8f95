"""ALLOCATORS: how many key heads and value heads each layer keeps under one budget. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from headfuse.config.fuse import FuseConfig
from headfuse.errors import BudgetError
from headfuse.plan import HeadBudget, HeadLayout

CostTable = Sequence[Sequence[float]]
"""`[2 * layers][n]`: cost of keeping 1 to n heads; key side of every layer first, then value side."""
Choices = Sequence[Sequence[int]]
"""`[rows]`: the head counts that each row of the cost table may have, ascending."""
Allocator = Callable[[int, Choices, CostTable | None], list[int]]


@dataclass(frozen=True)
class BudgetRules:
    """What a budget asks for, before anybody decides where the heads go.

    `total` is one share of the cache, or one for keys and one for values; counts per layer may be given outright.
    """

    total: Fraction | tuple[Fraction, Fraction] | None = Fraction(1, 4)
    key_heads: tuple[int, ...] | None = None
    value_heads: tuple[int, ...] | None = None
    keep_layers: tuple[int, ...] = ()
    min_key_heads: int = 1
    min_value_heads: int = 1
    layerwise: bool = False
    """As many value heads as key heads in every layer."""
    equal_groups: bool = False
    """With `layerwise`: counts that divide the source's, so that the groups of a layer have one size."""

    def leave_a_choice(self, heads: HeadLayout) -> bool:
        """Whether several allocations meet these rules, so that costs matter."""
        if self.total is None:
            return False
        chosen, choices = self.allocate("uniform", heads), self.choices(heads)
        rows = list(zip((*chosen.key_heads, *chosen.value_heads), choices, strict=True))
        return any(count > row[0] for count, row in rows) and any(count < row[-1] for count, row in rows)

    def choices(self, heads: HeadLayout) -> list[range]:
        """The counts that every layer may have: key side first, then value side.

        Raises:
            BudgetError: for layers or counts that this model does not have.
        """
        layers, n = heads.num_hidden_layers, heads.num_key_value_heads
        outside = [layer for layer in self.keep_layers if layer >= layers]
        if outside:
            raise BudgetError(
                f"layer {outside[0]} is not one of this model's",
                where="budget.keep_layers",
                fix=f"layers count from 0 to {layers - 1}",
            )
        rows = []
        for side, given, least in (
            ("key", self.key_heads, self.min_key_heads),
            ("value", self.value_heads, self.min_value_heads),
        ):
            if given is not None and (len(given) != layers or max(given) > n):
                raise BudgetError(
                    f"{len(given)} counts up to {max(given)}" if given else "no counts",
                    where=f"budget.{side}_heads",
                    fix=f"this model needs {layers} counts from 1 to {n}",
                )
            if least > n:
                raise BudgetError(
                    f"{least} is more than the model's {n} heads", where=f"budget.min_{side}_heads", fix=f"at most {n}"
                )
            for layer in range(layers):
                low, high = (least, n) if given is None else (given[layer], given[layer])
                rows.append(range(n, n + 1) if layer in self.keep_layers else range(low, high + 1))
        return rows

    def allocate(self, allocator: str, heads: HeadLayout, costs: CostTable | None = None) -> HeadBudget:
        """Head counts of every layer under these rules, by one of ALLOCATORS.

        Raises:
            BudgetError: when the budget is too small for the fewest heads that the rules allow.
        """
        choices, layers, side = self.choices(heads), heads.num_hidden_layers, heads.total_heads // 2
        choose = ALLOCATORS[allocator]
        if self.layerwise:
            return self._allocate_layers(choose, heads, choices, costs)
        if isinstance(self.total, tuple):
            keys = choose(_head_count(self.total[0], side, choices[:layers], "budget.total.key"),
                          choices[:layers], costs and costs[:layers])  # fmt: skip
            values = choose(_head_count(self.total[1], side, choices[layers:], "budget.total.value"),
                            choices[layers:], costs and costs[layers:])  # fmt: skip
            return HeadBudget(key_heads=tuple(keys), value_heads=tuple(values))
        if self.total is None:
            counts: Sequence[int] = [row[0] for row in choices]
        else:
            counts = choose(_head_count(self.total, heads.total_heads, choices, "--budget"), choices, costs)
        return HeadBudget(key_heads=tuple(counts[:layers]), value_heads=tuple(counts[layers:]))

    def _allocate_layers(
        self, choose: Allocator, heads: HeadLayout, choices: Choices, costs: CostTable | None
    ) -> HeadBudget:
        """As many value heads as key heads in every layer: one row per layer, whose heads are pairs."""
        layers, n = heads.num_hidden_layers, heads.num_key_value_heads
        if isinstance(self.total, tuple):
            raise BudgetError(
                "keys and values have budgets of their own, and layerwise gives both the same heads",
                where="budget.layerwise",
                fix="give one total, or use layout decoupled without budget.layerwise",
            )
        pairs = [
            [count for count in keys if count in values and (not self.equal_groups or n % count == 0)]
            for keys, values in zip(choices[:layers], choices[layers:], strict=True)
        ]
        if not all(pairs):
            raise BudgetError(
                f"layer {pairs.index([])} has no count that its keys and its values may both have"
                + f" and that divides the {n} of the source" * self.equal_groups,
                where="budget.layerwise",
                fix="give the same counts for both" + f", of {_divisors(n)}" * self.equal_groups,
            )
        if costs:
            costs = [
                [k + v for k, v in zip(keys, values, strict=True)]
                for keys, values in zip(costs[:layers], costs[layers:], strict=True)
            ]
        counts: Sequence[int] = [row[0] for row in pairs]
        if self.total is not None:
            counts = choose(_head_count(self.total, heads.total_heads // 2, pairs, "--budget"), pairs, costs)
        return HeadBudget(key_heads=tuple(counts), value_heads=tuple(counts))

    def allocate_gqa(self, heads: HeadLayout) -> HeadBudget:
        """The largest stock GQA shape under these rules: one count for all layers that divides the source's.

        Raises:
            BudgetError: when no such shape fits.
        """
        choices, n = self.choices(heads), heads.num_key_value_heads
        shapes = [c for c in _divisors(n) if all(c in row for row in choices)]
        if not shapes or self.keep_layers:
            raise BudgetError(
                "layout gqa has one head count for all layers, for keys and values alike",
                where="budget",
                fix="use layout decoupled, or drop keep_layers and the counts per layer",
            )
        if self.total is None:
            count = shapes[0]
        else:
            totals = self.total if isinstance(self.total, tuple) else (self.total, self.total)
            smallest = [range(shapes[0], n + 1)] * heads.num_hidden_layers
            budget = min(_head_count(t, heads.total_heads // 2, smallest, "--budget") for t in totals)
            count = max(c for c in shapes if c * heads.num_hidden_layers <= budget)
        return HeadBudget(key_heads=(count,) * heads.num_hidden_layers, value_heads=(count,) * heads.num_hidden_layers)


def budget_rules(config: FuseConfig) -> BudgetRules:
    """What the budget of some options asks for and their layout allows."""
    budget, layerwise = config.budget, config.layout == "layerwise"
    return BudgetRules(
        budget.shares,
        budget.key_heads,
        budget.value_heads,
        budget.keep_layers,
        budget.min_key_heads,
        budget.min_value_heads,
        layerwise=layerwise or budget.layerwise,
        equal_groups=layerwise,
    )


def _divisors(n: int) -> list[int]:
    return [count for count in range(1, n + 1) if n % count == 0]


def _head_count(budget: Fraction, source: int, choices: Choices, where: str) -> int:
    """Heads that a share of `source` heads buys, rounded within half a head, at most what the choices hold."""
    count, least = math.floor(budget * source + Fraction(1, 2)), sum(row[0] for row in choices)
    if count < least:
        raise BudgetError(
            f"{float(budget):.4g} keeps {count} of {source} heads, and at least {least} are needed "
            f"for the fewest heads of every layer",
            where=where,
            fix=f"the smallest budget that works here is {Fraction(least, source)}",
        )
    return min(count, sum(row[-1] for row in choices))


def uniform(total: int, choices: Choices, costs: CostTable | None = None) -> list[int]:
    """The same for every row as far as it divides; what is left goes to the first rows, so to keys before values."""
    counts = [row[0] for row in choices]
    left = total - sum(counts)
    for level in sorted(set[int]().union(*choices)):
        for index, row in enumerate(choices):
            step = level - counts[index]
            if level in row and 0 < step <= left:
                counts[index] = level
                left -= step
    return counts


def least_cost(total: int, choices: Choices, costs: CostTable | None = None) -> list[int]:
    """The counts of least total cost: an exact dynamic programme over the table (mathematics.md section 8.6).

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


def dha_greedy(total: int, choices: Choices, costs: CostTable | None = None) -> list[int]:
    """The fewest for every row, then shares of n/2, n/4, n/8, ... where the loss per head is largest.

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
    "uniform": uniform,
    "dha-greedy": dha_greedy,
    "sensitivity": least_cost,
    "taylor": least_cost,
    "shapley": least_cost,
}
"""Each spends `total` heads on rows whose choices enclose it, fewer only where no choice makes use of the rest. Those
of least cost differ in their table: the measured cost of fusing (sensitivity), or scores of single heads
(importance.py)."""
