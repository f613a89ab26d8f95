"""Laws of budgets: what every allocator spends, and what it refuses."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from headfuse.choices import ONE_COUNT, SHARED_PARTITION, WIDE
from headfuse.errors import BudgetError
from headfuse.layouts import LAYOUTS
from headfuse.plan import HeadLayout
from headfuse.planning.allocators import ALLOCATORS, least_cost, shrunk
from headfuse.planning.budget import BudgetRules
from headfuse.planning.costs import CostTable
from headfuse.planning.importance import HEAD_IMPORTANCE
from tests.laws.tables import allocators

# 5
SHAPE = HeadLayout(
    model_type="llama", num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8
)


def falling_costs(seed: int) -> CostTable:
    table = torch.rand(2 * SHAPE.num_hidden_layers, 4, generator=torch.Generator().manual_seed(seed))
    table = table.flip(1).cumsum(1).flip(1)
    rows = (table - table[:, -1:]).tolist()
    return CostTable(rows[: SHAPE.num_hidden_layers], rows[SHAPE.num_hidden_layers :])


@allocators
@pytest.mark.parametrize("seed", range(3))
def test_allocators_spend_the_budget_and_no_more(allocator: str, seed: int) -> None:
    costs, before = falling_costs(seed), float("inf")
    for total in range(6, 25):
        rules = BudgetRules(Fraction(total, SHAPE.total_heads))
        budget = rules.allocate(allocator, SHAPE, costs)
        assert budget == rules.allocate(allocator, SHAPE, costs)
        counts = budget.key_heads + budget.value_heads
        assert sum(counts) == total
        assert all(1 <= count <= 4 for count in counts)
        read = shrunk(costs.rows) if allocator == "shrinkage" else costs.rows
        loss = sum(row[count - 1] for row, count in zip(read, counts, strict=True))
        assert loss <= before + 1e-9
        before = loss


@pytest.mark.parametrize("seed", range(4))
def test_sensitivity_is_optimal(seed: int) -> None:
    costs, choices = falling_costs(seed).rows, [[1, 2, 3, 4], [2, 3], [1], [4], [1, 2, 3], [1, 2, 3, 4]]
    best: dict[int, float] = {}
    for counts in itertools.product(*choices):
        loss = sum(row[count - 1] for row, count in zip(costs, counts, strict=True))
        best[sum(counts)] = min(loss, best.get(sum(counts), loss))
    assert min(best) == 10
    for total, loss in best.items():
        chosen = least_cost(total, choices, costs)
        assert all(count in row for count, row in zip(chosen, choices, strict=True))
        assert sum(row[count - 1] for row, count in zip(costs, chosen, strict=True)) == pytest.approx(loss)


def test_shrinkage_is_between_sensitivity_and_uniform() -> None:
    """A row that costs a little more gets no more than others, one that costs far more does, but less than all."""
    common = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.0]
    little, far = [[factor * cost for cost in common] for factor in (1.05, 20.0)]
    choices = [list(range(1, 9))] * 4
    for row, more in ((little, False), (far, True)):
        counts = {
            name: ALLOCATORS[name].choose(16, choices, [row, common, common, common])
            for name in ("uniform", "shrinkage", "sensitivity")
        }
        assert counts["uniform"] == [4, 4, 4, 4]
        assert (counts["shrinkage"] != counts["uniform"]) is more
        assert counts["uniform"][0] <= counts["shrinkage"][0] <= counts["sensitivity"][0]
    assert counts["shrinkage"][0] < counts["sensitivity"][0]


@allocators
def test_rules_of_a_budget_hold(allocator: str) -> None:
    costs = falling_costs(1)
    budget = BudgetRules(Fraction(3, 4), keep_layers=(1,), min_value_heads=2).allocate(allocator, SHAPE, costs)
    assert (budget.key_heads[1], budget.value_heads[1]) == (4, 4)
    assert min(budget.value_heads) >= 2
    assert budget.total == 18
    budget = BudgetRules((Fraction(1, 2), Fraction(1, 4))).allocate(allocator, SHAPE, costs)
    assert (sum(budget.key_heads), sum(budget.value_heads)) == (6, 3)
    budget = BudgetRules(None, key_heads=(1, 2, 3), value_heads=(4, 1, 1)).allocate(allocator, SHAPE, costs)
    assert (budget.key_heads, budget.value_heads) == ((1, 2, 3), (4, 1, 1))
    budget = BudgetRules(Fraction(1, 2), key_heads=(1, 2, 3)).allocate(allocator, SHAPE, costs)
    assert (budget.key_heads, sum(budget.value_heads)) == ((1, 2, 3), 6)


@pytest.mark.parametrize(
    "rules",
    [
        BudgetRules(Fraction(1, 5)),
        BudgetRules(Fraction(1, 2), min_key_heads=4),
        BudgetRules(Fraction(1, 2), min_key_heads=5),
        BudgetRules(Fraction(1, 2), keep_layers=(3,)),
        BudgetRules(Fraction(1, 2), keep_layers=(0, 1)),
        BudgetRules(None, key_heads=(1, 2), value_heads=(1, 1)),
        BudgetRules(None, key_heads=(1, 2, 5), value_heads=(1, 1, 1)),
        BudgetRules((Fraction(1, 2), Fraction(1, 8))),
    ],
)
def test_impossible_rules_are_refused(rules: BudgetRules) -> None:
    with pytest.raises(BudgetError, match=r"\n"):
        rules.allocate("uniform", SHAPE)


@allocators
def test_the_smallest_budget_that_a_refusal_names_works(allocator: str) -> None:
    costs = falling_costs(2)
    with pytest.raises(BudgetError) as refused:
        BudgetRules(Fraction(1, 10), min_key_heads=2).allocate(allocator, SHAPE, costs)
    smallest = Fraction(str(refused.value.fix).split()[-1])
    assert BudgetRules(smallest, min_key_heads=2).allocate(allocator, SHAPE, costs).total == 9


@pytest.mark.parametrize(("budget", "count"), [("1/4", 1), ("1/3", 1), ("0.5", 2), ("0.9", 2), ("1", 4)])
def test_gqa_takes_the_largest_shape_within_the_budget(budget: str, count: int) -> None:
    result = BudgetRules(Fraction(budget), one_count=True).allocate("uniform", SHAPE)
    assert result.key_heads == result.value_heads == (count,) * 3


def test_a_plan_is_checked_by_the_facts_of_its_layout() -> None:
    """plan.py has them without torch."""
    assert {name for name, layout in LAYOUTS.items() if layout.shared_partition} == set(SHARED_PARTITION)
    assert {name for name, layout in LAYOUTS.items() if layout.one_count} == set(ONE_COUNT)
    assert {name for name, layout in LAYOUTS.items() if layout.wide} == set(WIDE)


def test_scores_of_heads_exist_for_the_allocators_that_read_them() -> None:
    assert {name for name, entry in ALLOCATORS.items() if entry.costs == "importance"} == HEAD_IMPORTANCE.keys()


def test_a_budget_rounds_within_half_a_head() -> None:
    for total in range(6, 25):
        for part in (Fraction(-49, 100), Fraction(49, 100)):
            share = min(Fraction(1), (total + part) / 24)
            if total + part >= 6 - Fraction(1, 2):
                assert BudgetRules(share).allocate("uniform", SHAPE).total == total
