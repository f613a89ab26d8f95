"""Method dha without a model: its losses, its groups, its rounds and its greedy budget."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from headfuse.dha import pipeline as stages
from headfuse.dha import ratios as dha
from headfuse.plan import HeadLayout
from headfuse.planning.budget import BudgetRules
from headfuse.planning.costs import CostTable
from headfuse.planning.grouping import anneal


def symmetric(n: int) -> list[list[float]]:
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    found: list[list[float]] = (cost + cost.T).fill_diagonal_(0).tolist()
    return found


PAIRS = ((0, 2), (1, 3))


def test_fusion_loss_is_one_for_pairs_at_the_identity_and_the_raw_sum_is_the_paper_s() -> None:
    for groups, mean, raw in ((PAIRS, 1.0, 2 * 16), (((0, 1, 2, 3),), 0.5, 3 * 16)):  # (g - 1) d per group
        omega = dha.identity(range(4), 4, 16)
        total, pairs = dha.fusion_loss(omega, groups, range(4))
        assert total.item() / pairs == pytest.approx(mean)
        assert total.item() * 16 == pytest.approx(raw)


def test_the_target_falls_from_one_to_zero() -> None:
    targets = [dha.target(step, 0.9, 10) for step in range(15)]
    assert targets[0] == 1
    assert targets[10:] == [0.0] * 5
    assert all(later < sooner for sooner, later in itertools.pairwise(targets[:11]))
    assert targets[5] == pytest.approx(0.9**5 / 2)


def test_annealing_gives_equal_groups_by_its_seed() -> None:
    cost = symmetric(12)
    found = {anneal(cost, 4, True, seed) for seed in range(8)}
    assert len(found) > 1
    assert all({len(group) for group in groups} == {3} for groups in found)
    assert anneal(cost, 4, True, 3) == anneal(cost, 4, True, 3)
    # on the scale of its temperatures it finds the groups: 110 proposals are few
    planted = [[0.0 if i // 2 == j // 2 else 1e4 for j in range(4)] for i in range(4)]
    assert all(anneal(planted, 2, True, seed) == ((0, 1), (2, 3)) for seed in range(8))


@pytest.mark.parametrize("grouping", ["anneal", "cluster", "neighbours"])
@pytest.mark.parametrize("progressive", [True, False])
def test_rounds_end_at_every_count(grouping: str, progressive: bool) -> None:
    cost = symmetric(7)
    for count in range(1, 8):
        heads = 7
        for groups in stages.divide(cost, count, grouping, progressive, 0):
            assert sorted(head for group in groups for head in group) == list(range(heads))
            assert not progressive or max(map(len, groups)) == 2
            heads = len(groups)
        assert heads == count


def test_a_round_fuses_the_pairs_of_the_smallest_loss() -> None:
    far = [[0.0 if i == j else 1.0 for j in range(4)] for i in range(4)]
    far[2][3] = far[3][2] = 0.1
    assert stages.divide(far, 3, "neighbours", True, 0) == [((0,), (1,), (2, 3))]


def test_greedy_gives_the_largest_losses_the_largest_shares() -> None:
    heads = HeadLayout(
        model_type="llama", num_hidden_layers=4, hidden_size=64, num_attention_heads=16, num_key_value_heads=16,
        head_dim=4,
    )  # fmt: skip
    rows = [[loss] * 16 for loss in (8.0, 6.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0)]
    budget = BudgetRules(Fraction(1, 4)).allocate("dha-greedy", heads, CostTable(rows[:4], rows[4:]))
    counts = budget.key_heads + budget.value_heads
    assert sum(counts) == 32
    assert counts[0] >= 8  # a share of n/2, and perhaps one of the last single heads
    assert list(counts) == sorted(counts, reverse=True)
