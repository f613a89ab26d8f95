"""Allocations of a budget over the layers."""

from __future__ import annotations

import itertools

import pytest
import torch

from headfuse.config.values import parse_budget
from headfuse.errors import BudgetError
from headfuse.plan import HeadLayout
from headfuse.planning.budget import BudgetRules
from headfuse.planning.costs import CostTable

LAYOUT = HeadLayout(
    model_type="llama", num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8
)


def test_layerwise_is_optimal() -> None:
    """Of all plans with as many value heads as key heads in every layer, the one of least cost."""
    generator = torch.Generator().manual_seed(0)
    table = (torch.rand(6, 4, generator=generator).cumsum(1).flip(1)).tolist()
    rules = BudgetRules(total=parse_budget("0.5"), layerwise=True)
    chosen = rules.allocate("sensitivity", LAYOUT, CostTable(table[:3], table[3:]))
    assert chosen.key_heads == chosen.value_heads
    assert chosen.total == 12

    def cost(counts: tuple[int, ...]) -> float:
        return sum(table[i][c - 1] + table[3 + i][c - 1] for i, c in enumerate(counts))

    plans = [c for c in itertools.product(range(1, 5), repeat=3) if sum(c) == 6]
    assert cost(chosen.key_heads) == pytest.approx(min(map(cost, plans)))


def test_layerwise_has_one_total() -> None:
    share = parse_budget("0.5")
    with pytest.raises(BudgetError, match="layerwise"):
        BudgetRules(total=(share, share), layerwise=True).allocate("uniform", LAYOUT)


def test_one_count_has_one_total() -> None:
    """Both sides got the smaller share, without a word."""
    with pytest.raises(BudgetError, match="layout gqa gives both the same heads"):
        BudgetRules(total=(parse_budget("1"), parse_budget("1/4")), layerwise=True, one_count=True)


@pytest.mark.parametrize(("total", "choice"), [("1/4", False), ("1", False), ("1/2", True)])
def test_a_choice_is_left(total: str, choice: bool) -> None:
    assert BudgetRules(total=parse_budget(total)).leave_a_choice(LAYOUT) is choice


@pytest.mark.parametrize(("budget", "width"), [("1/3", 64), ("0.3333", 64), ("0.32", 48)])
def test_a_budget_in_digits_is_the_fraction_that_it_means(budget: str, width: int) -> None:
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64}
    rules = BudgetRules(total=parse_budget(budget), one_count=True, head_dim="auto")
    assert rules.one_width(LAYOUT.model_copy(update=sizes)) == (1, width)


BUDGETS = ("1/10", "1/6", "1/4", "0.3333", "1/2", "0.66", "0.9", "1")
KEPT = [((), BUDGETS), ((0,), BUDGETS[2:]), ((1, 3), BUDGETS[4:]), ((1, 3, 3, 1, 1, 3), BUDGETS[4:])]


@pytest.mark.parametrize(("budget", "keep"), [(budget, keep) for keep, budgets in KEPT for budget in budgets])
def test_no_wide_head_is_narrower_than_half_of_an_equal_share(budget: str, keep: tuple[int, ...]) -> None:
    heads = LAYOUT.model_copy(update={"num_hidden_layers": 5, "head_dim": 32})
    total = parse_budget(budget)
    left = (total * 5 - len(set(keep))) / (5 - len(set(keep)))
    # the first layer's keys are worth everything, and all the rest nothing
    costs = CostTable(*([[100.0 / (c + 1) if wanted and i == 0 else 0.0 for c in range(16)] for i in range(5)]
                        for wanted in (True, False)))  # fmt: skip
    for rules in (BudgetRules(total, keep_layers=keep, wide=True), BudgetRules((total, total), wide=True)):
        found = rules.allocate("sensitivity", heads, costs)
        share = left if rules.keep_layers else total
        least = min(count for counts in (found.key_heads, found.value_heads) for count in counts)
        assert share * 16 / 2 - 0.01 <= least <= share * 16
        assert found.total <= total * 160 + 1
    if not keep:
        narrow = BudgetRules(total, wide=True, min_channels=8).allocate("sensitivity", heads, costs)
        assert min(narrow.value_heads) == (16 if total == 1 else 1)
