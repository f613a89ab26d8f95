"""ALLOCATORS: how many key heads and value heads each layer keeps under one budget. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from headfuse.errors import BudgetError
from headfuse.plan import HeadBudget, HeadLayout

CostTable = Sequence[Sequence[float]]
"""`[2 * layers][n]`: cost of keeping 1 to n heads; key side of every layer first, then value side."""


def parse_budget(text: str) -> Fraction:
    """A budget written as a decimal or a fraction, `0.25` or `1/4`.

    Raises:
        ValueError: unless it is a number above 0 and at most 1.
    """
    try:
        value = Fraction(str(text).strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number: write a decimal or a fraction, like 0.25 or 1/4") from None
    if not 0 < value <= 1:
        raise ValueError(
            f"{text} is out of range: the budget is kept KV bytes over the source's, above 0 and at most 1"
        )
    return value


def head_count(budget: Fraction, heads: HeadLayout) -> int:
    """Heads that a budget buys over all layers, rounded within half a head.

    Raises:
        BudgetError: when it is too small for one key head and one value head per layer.
    """
    total = math.floor(budget * heads.total_heads + Fraction(1, 2))
    if total < 2 * heads.num_hidden_layers:
        smallest = Fraction(1, heads.num_key_value_heads)
        raise BudgetError(
            f"{float(budget):.4g} keeps {total} heads, fewer than one key head and one value head in each of "
            f"{heads.num_hidden_layers} layers",
            where="--budget",
            fix=f"the smallest budget that works for this model is {smallest}",
        )
    return total


def uniform(total: int, heads: HeadLayout, costs: CostTable | None = None) -> HeadBudget:
    """The same for every layer, keys before values where it does not divide; what is left goes to the first layers."""
    layers, n = heads.num_hidden_layers, heads.num_key_value_heads
    per_layer, left = divmod(min(total, heads.total_heads), layers)
    counts = [per_layer + (index < left) for index in range(layers)]
    keys = tuple(min(n, (count + 1) // 2) for count in counts)
    return HeadBudget(key_heads=keys, value_heads=tuple(c - k for c, k in zip(counts, keys, strict=True)))


def sensitivity(total: int, heads: HeadLayout, costs: CostTable | None = None) -> HeadBudget:
    """The counts of least total cost: an exact dynamic programme over the table (math.md 4)."""
    if costs is None:
        raise ValueError("sensitivity needs a cost table")
    layers, n = heads.num_hidden_layers, heads.num_key_value_heads
    total = min(total, heads.total_heads)
    best = [0.0] + [math.inf] * total
    choices: list[list[int]] = []
    for row in costs:
        falling = [min(row[: count + 1]) for count in range(n)]  # more heads never cost more
        new, choice = [math.inf] * (total + 1), [0] * (total + 1)
        for used in range(1, total + 1):
            for count in range(1, min(n, used) + 1):
                value = best[used - count] + falling[count - 1]
                if value < new[used]:
                    new[used], choice[used] = value, count
        best = new
        choices.append(choice)
    counts, used = [], total
    for choice in reversed(choices):
        counts.append(choice[used])
        used -= choice[used]
    counts.reverse()
    return HeadBudget(key_heads=tuple(counts[:layers]), value_heads=tuple(counts[layers:]))


ALLOCATORS: dict[str, Callable[[int, HeadLayout, CostTable | None], HeadBudget]] = {
    "uniform": uniform,
    "sensitivity": sensitivity,
}


def gqa(total: int, heads: HeadLayout) -> HeadBudget:
    """The largest stock GQA shape within the budget: one count for all layers that divides the source's."""
    n, layers = heads.num_key_value_heads, heads.num_hidden_layers
    count = max(c for c in range(1, n + 1) if n % c == 0 and 2 * layers * c <= total)
    return HeadBudget(key_heads=(count,) * layers, value_heads=(count,) * layers)
