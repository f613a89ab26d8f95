"""How many key heads and value heads each layer keeps under one budget, or how wide they are. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from headfuse.config.fuse import BudgetConfig
from headfuse.errors import BudgetError
from headfuse.plan import HeadBudget, HeadLayout
from headfuse.planning.allocators import ALLOCATORS, Choices, Choose
from headfuse.planning.costs import CostTable
from headfuse.planning.widths import WIDEST, least_width, width_quantum


@dataclass(frozen=True)
class BudgetRules:
    """The rules of a budget, before heads are divided among layers.

    `total` is one share of the cache, or one for keys and one for values; counts per layer may be given outright.
    """

    total: Fraction | tuple[Fraction, Fraction] | None = Fraction(1, 4)
    key_heads: tuple[int, ...] | None = None
    value_heads: tuple[int, ...] | None = None
    keep_layers: tuple[int, ...] = ()
    min_key_heads: int = 1
    min_value_heads: int = 1
    min_channels: int | None = None
    """None: of wide heads LEAST_WIDTH of what equal widths would be."""
    layerwise: bool = False
    """As many value heads as key heads in every layer; of wide heads, as many channels."""
    equal_groups: bool = False
    """With `layerwise`: counts that divide the source's, so that the groups of a layer have one size."""
    one_count: bool = False
    """One count for keys and values of all layers that divides the source's: the shape of stock GQA."""
    wide: bool = False
    """Heads have widths of their own: what is counted is not heads but quanta of their channels."""
    head_dim: int | str | None = None
    """With `one_count`: channels of a fused head, or `auto`; None: the source's."""

    def __post_init__(self) -> None:
        if isinstance(self.total, tuple) and (len(set(self.total)) > 1 if self.one_count else self.layerwise):
            shape, where = ("layout gqa", "budget.total") if self.one_count else ("layerwise", "budget.layerwise")
            raise BudgetError(
                f"keys and values have budgets of their own, and {shape} gives both the same heads",
                where=where, fix="give one total, or use layout decoupled without budget.layerwise",
            )  # fmt: skip

    def channels(self, heads: HeadLayout) -> int:
        """Channels of one counted unit: a head, or a quantum."""
        if self.head_dim is not None:
            return self.one_width(heads)[1]
        return width_quantum(heads) if self.wide else heads.head_dim

    def counted(self, heads: HeadLayout) -> int:
        """Counted units, heads or quanta, in one side of one source layer."""
        return heads.num_key_value_heads * heads.head_dim // self.channels(heads)

    def leave_a_choice(self, heads: HeadLayout) -> bool:
        """Whether several allocations meet these rules, so that costs matter."""
        if self.total is None or self.one_count:
            return False
        chosen, choices = self.allocate("uniform", heads), self.choices(heads)
        rows = list(zip((*chosen.key_heads, *chosen.value_heads), choices, strict=True))
        return any(count > row[0] for count, row in rows) and any(count < row[-1] for count, row in rows)

    def choices(self, heads: HeadLayout) -> list[range]:
        """The counts that every layer may have: key side first, then value side.

        Raises:
            BudgetError: for layers or counts that this model does not have.
        """
        layers, n = heads.num_hidden_layers, self.counted(heads)
        outside = [layer for layer in self.keep_layers if layer >= layers]
        if outside:
            raise BudgetError(
                f"layer {outside[0]} is not one of this model's", where="budget.keep_layers",
                fix=f"layers count from 0 to {layers - 1}",
            )  # fmt: skip
        rows, shares = list[range](), self.total if isinstance(self.total, tuple) else (self.total, self.total)
        for side, share, given, least in (
            ("key", shares[0], self.key_heads, self.min_key_heads),
            ("value", shares[1], self.value_heads, self.min_value_heads),
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
            least = max(least, self._least(share, heads))
            for layer in range(layers):
                low, high = (least, n) if given is None else (given[layer], given[layer])
                rows.append(range(n, n + 1) if layer in self.keep_layers else range(low, high + 1))
        return rows

    def _least(self, share: Fraction | None, heads: HeadLayout) -> int:
        """Counted units that every layer keeps of a side with this budget, whatever they cost."""
        least = self.min_channels or 1
        if self.wide and share is not None:
            least = least_width(self.min_channels, share, heads, len(set(self.keep_layers)))
        return max(1, min(self.counted(heads), -(-least // self.channels(heads))))

    def allocate(self, allocator: str, heads: HeadLayout, costs: CostTable | None = None) -> HeadBudget:
        """Head counts of every layer under these rules, by one of ALLOCATORS.

        Raises:
            BudgetError: when the budget is too small for the fewest heads that the rules allow.
        """
        if self.head_dim is not None:
            count = (self.one_width(heads)[0],) * heads.num_hidden_layers
            return HeadBudget(key_heads=count, value_heads=count)
        if self.one_count:
            return self._allocate_one_count(heads)
        choices, layers = self.choices(heads), heads.num_hidden_layers
        side = layers * self.counted(heads)
        counted = f"quanta of {self.channels(heads)} channels" if self.wide else "heads"
        choose = ALLOCATORS[allocator].choose
        if self.layerwise:
            return self._allocate_layers(choose, heads, choices, costs)
        if isinstance(self.total, tuple):
            key_choices, value_choices = choices[:layers], choices[layers:]
            key_total = _head_count(self.total[0], side, key_choices, "budget.total.key", counted)
            value_total = _head_count(self.total[1], side, value_choices, "budget.total.value", counted)
            keys = choose(key_total, key_choices, costs.key if costs else None)
            values = choose(value_total, value_choices, costs.value if costs else None)
            return HeadBudget(key_heads=tuple(keys), value_heads=tuple(values))
        if self.total is None:
            counts: Sequence[int] = [row[0] for row in choices]
        else:
            total = _head_count(self.total, 2 * side, choices, "--budget", counted)
            counts = choose(total, choices, costs.rows if costs else None)
        return HeadBudget(key_heads=tuple(counts[:layers]), value_heads=tuple(counts[layers:]))

    def _allocate_layers(
        self, choose: Choose, heads: HeadLayout, choices: Choices, costs: CostTable | None
    ) -> HeadBudget:
        """As many value heads as key heads in every layer: one row per layer, whose heads are pairs."""
        layers, n = heads.num_hidden_layers, self.counted(heads)
        assert not isinstance(self.total, tuple)  # refused from the start
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
        counts: Sequence[int] = [row[0] for row in pairs]
        if self.total is not None:
            counted = f"quanta of {self.channels(heads)} channels" if self.wide else "heads"
            total = _head_count(self.total, layers * n, pairs, "--budget", counted)
            counts = choose(total, pairs, costs.pairs if costs else None)
        return HeadBudget(key_heads=tuple(counts), value_heads=tuple(counts))

    def one_width(self, heads: HeadLayout) -> tuple[int, int]:
        """How many heads every layer gets, for keys and values alike, and how wide they are.

        Of a given width as many as the budget holds; of `auto` the fewest that are no wider than WIDEST, since a wide
        head loses less than two of half its width.

        Raises:
            BudgetError: when not one such head fits, saying which budget works.
        """
        n, d = heads.num_key_value_heads, heads.head_dim
        totals = self.total if isinstance(self.total, tuple) else (self.total or Fraction(1, n),) * 2
        # to the nearest channel: 0.3333 of 192 is meant to be 64
        channels, quantum = round(min(totals) * n * d), width_quantum(heads)
        shapes = []
        for count in _divisors(n):
            room = min(channels // count, n // count * d)
            fits = room // quantum * quantum if self.head_dim == "auto" else self.head_dim
            if isinstance(fits, int) and 0 < fits <= room:
                shapes.append((count, fits))
        if not shapes:
            least = quantum if self.head_dim == "auto" else int(self.head_dim or d)
            raise BudgetError(
                f"{float(min(totals)):.4g} keeps {channels} channels of a layer's {n * d} on each side, and heads of "
                f"{self.head_dim} channels do not fit",
                where="--head-dim",
                fix=f"the smallest budget for one head of {least} channels is {Fraction(least, n * d)}"
                if least <= n * d
                else f"give at most {n * d}, or auto",
            )
        if self.head_dim == "auto":
            return next((shape for shape in shapes if shape[1] <= WIDEST), shapes[-1])
        return shapes[-1]

    def _allocate_one_count(self, heads: HeadLayout) -> HeadBudget:
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


def budget_rules(budget: BudgetConfig, shared_partition: bool, one_count: bool, wide: bool = False) -> BudgetRules:
    """What a budget asks for and a layout allows.

    Args:
        budget: the options.
        shared_partition: whether the layout's keys and values share one partition of a layer's heads.
        one_count: whether the layout has one count for all layers.
        wide: whether its heads have widths of their own.

    Raises:
        BudgetError: for rules that count heads, where there is one wide head.
    """
    if budget.head_dim is not None and not one_count:
        raise BudgetError(
            "is the width of the heads of layout gqa", where="--head-dim", fix="add --layout gqa, or leave it out"
        )
    counts = (*_COUNT_HEADS, "keep_layers") if budget.head_dim is not None else _COUNT_HEADS
    for name in counts if wide or budget.head_dim is not None else ():
        if getattr(budget, name) != BudgetConfig.model_fields[name].default:
            raise BudgetError(
                "counts heads, and layout latent has one wide head for keys and one for values in every layer"
                if wide
                else "counts heads of the source's width, and --head-dim changes it",
                where=f"budget.{name}",
                fix="leave it out, or use layout decoupled",
            )
    return BudgetRules(
        budget.shares,
        budget.key_heads,
        budget.value_heads,
        budget.keep_layers,
        budget.min_key_heads,
        budget.min_value_heads,
        budget.min_channels,
        layerwise=shared_partition or budget.layerwise,
        equal_groups=shared_partition,
        one_count=one_count,
        wide=wide,
        head_dim=budget.head_dim,
    )


_COUNT_HEADS = ("key_heads", "value_heads", "min_key_heads", "min_value_heads")
"""Options of a budget that count heads."""


def _divisors(n: int) -> list[int]:
    return [count for count in range(1, n + 1) if n % count == 0]


def _head_count(budget: Fraction, source: int, choices: Choices, where: str, counted: str = "heads") -> int:
    """Heads that a share of `source` heads buys, rounded within half a head, at most what the choices hold."""
    count, least = math.floor(budget * source + Fraction(1, 2)), sum(row[0] for row in choices)
    if count < least:
        raise BudgetError(
            f"{float(budget):.4g} keeps {count} of {source} {counted}, but at least {least} are needed "
            f"to give every layer its fewest {counted}",
            where=where,
            fix=f"the smallest budget that works here is {Fraction(least, source)}",
        )
    return min(count, sum(row[-1] for row in choices))
