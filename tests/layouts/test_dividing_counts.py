"""Budgets of layout layerwise: head counts that divide the query heads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from headfuse.errors import BudgetError
from headfuse.plan import HeadLayout
from headfuse.planning.allocators import ALLOCATORS
from headfuse.planning.budget import BudgetRules
from headfuse.planning.costs import CostTable

SHAPE = HeadLayout(
    model_type="llama", num_hidden_layers=3, hidden_size=48, num_attention_heads=12, num_key_value_heads=12, head_dim=4
)


DIVISORS = (1, 2, 3, 4, 6, 12)


@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_plan_of_dividing_counts(seed: int) -> None:
    table = torch.rand(6, 12, generator=torch.Generator().manual_seed(seed)).flip(1).cumsum(1).flip(1).tolist()
    before = float("inf")
    for pairs in range(3, 37):
        rules = BudgetRules(Fraction(pairs, 36), layerwise=True, equal_groups=True)
        chosen = rules.allocate("sensitivity", SHAPE, CostTable(table[:3], table[3:]))
        assert chosen.key_heads == chosen.value_heads
        assert set(chosen.key_heads) <= set(DIVISORS)

        def cost(counts: tuple[int, ...]) -> float:
            return sum(table[i][c - 1] + table[3 + i][c - 1] for i, c in enumerate(counts))

        plans = [counts for counts in itertools.product(DIVISORS, repeat=3) if sum(counts) <= pairs]
        assert cost(chosen.key_heads) == pytest.approx(min(map(cost, plans)))
        assert cost(chosen.key_heads) <= before + 1e-9
        before = cost(chosen.key_heads)


GREEDY = ("uniform", "dha-greedy")


@pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
def test_no_more_heads_fit(allocator: str) -> None:
    flat = CostTable([[0.0] * 12] * 3, [[0.0] * 12] * 3)  # all plans cost the same
    for pairs in range(3, 37):
        chosen = BudgetRules(Fraction(pairs, 36), layerwise=True, equal_groups=True).allocate(allocator, SHAPE, flat)
        most = max(sum(c) for c in itertools.product(DIVISORS, repeat=3) if sum(c) <= pairs)
        steps = [DIVISORS[DIVISORS.index(c) + 1] - c for c in chosen.key_heads if c < 12]
        assert sum(chosen.key_heads) <= pairs
        assert sum(chosen.key_heads) == most or (allocator in GREEDY and sum(chosen.key_heads) + min(steps) > pairs)


@pytest.mark.parametrize(
    "rules",
    [
        BudgetRules(None, key_heads=(5, 1, 1), value_heads=(5, 1, 1)),
        BudgetRules(None, key_heads=(4, 1, 1), value_heads=(2, 1, 1)),
        BudgetRules((Fraction(1, 2), Fraction(1, 2))),
    ],
)
def test_what_no_layerwise_model_has_is_refused(rules: BudgetRules) -> None:
    with pytest.raises(BudgetError, match=r"\n"):
        replace(rules, layerwise=True, equal_groups=True).allocate("uniform", SHAPE)
