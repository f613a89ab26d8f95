"""From the ratios that a search learned to head distances, groups and a budget (DHA, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from headfuse.dha import ratios as dha
from headfuse.dha.operator import MixedProjection, single_heads
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan, Groups, HeadLayout, LayerPlan
from headfuse.planning.allocators import ALLOCATORS
from headfuse.planning.costs import CostTable
from headfuse.planning.grouping import GROUPERS, anneal, canonical
from headfuse.planning.planner import PlanOptions, ProgressCallback, plan_of, survey
from headfuse.text.calibration import CalibrationText


def distances(side: MixedProjection, heads: HeadLayout) -> torch.Tensor:
    """L_head of every two source heads `[n, n]`, the mean over their query heads."""
    with torch.no_grad():
        n = heads.num_key_value_heads
        loss = dha.head_loss(side.ratios(), n).cpu().double()
        loss = loss.view(n, heads.queries_per_head, n, heads.queries_per_head).mean((1, 3))
        return loss.fill_diagonal_(0)


def decide(
    source: Source,
    streamed: StreamedModel,
    options: PlanOptions,
    progressive: bool,
    text: CalibrationText,
    costs: list[list[list[float]]],
    on_progress: ProgressCallback,
) -> FusionPlan:
    """Budgets and groups: what the search found, or another allocator's table.

    Args:
        source: the opened source.
        streamed: for the survey of other allocators.
        options: what decides the plan.
        progressive: whether rounds halve the heads.
        text: windows for it.
        costs: `[2 layers, n, n]` distances, keys of all layers first.
        on_progress: as for `train`.
    """
    n, layers = source.heads.num_key_value_heads, source.heads.num_hidden_layers
    allocator, table = ALLOCATORS[options.allocator], None
    if allocator.reads_search:
        losses = [sum(map(sum, cost)) / 2 for cost in costs]  # of a layer: the sum over its pairs
        rows = [[loss * (n - count) / max(1, n - 1) for count in range(1, n + 1)] for loss in losses]
        table = CostTable(rows[:layers], rows[layers:])
    elif allocator.costs != "none":
        table = survey(streamed, text, options, on_progress).costs
    budget = options.rules.allocate(options.allocator if table else "uniform", source.heads, table)
    groups, alone = list[Groups](), single_heads(n)
    for cost, count in zip(costs, budget.key_heads + budget.value_heads, strict=True):
        rounds = divide(cost, count, options.grouping, progressive, options.seed)
        groups.append(reduce(_merged, rounds, alone))
    pairs = zip(groups[:layers], groups[layers:], strict=True)
    layer_plans = [
        LayerPlan(layer_idx=i, key_groups=keys, value_groups=values) for i, (keys, values) in enumerate(pairs)
    ]
    return plan_of(source, options, layer_plans)


def sides_of(plan: FusionPlan) -> list[Groups]:
    """The groups of all layers' keys, then of all layers' values."""
    return [layer.key_groups for layer in plan.layers] + [layer.value_groups for layer in plan.layers]


def divide(cost: Sequence[Sequence[float]], count: int, grouping: str, progressive: bool, seed: int) -> list[Groups]:
    """Rounds of groups, each over the heads that the one before it leaves, until `count` heads are left.

    A progressive round divides the heads into pairs and fuses those of the smallest loss; of heads that are fused
    already it knows the mean of the distances that the search measured.
    """
    table = torch.tensor(cost, dtype=torch.float64)
    heads, rounds = single_heads(len(table)), list[Groups]()
    while len(heads) > count:
        m = len(heads)
        between = [[float(table[list(a)][:, list(b)].mean()) for b in heads] for a in heads]
        number = -(-m // 2) if progressive else count
        equal = m % number == 0
        groups = (
            anneal(between, number, equal, seed) if grouping == "anneal" else GROUPERS[grouping](between, number, equal)
        )
        if progressive:
            pairs = sorted((group[:2] for group in groups if len(group) > 1), key=lambda p: between[p[0]][p[1]])
            fused = pairs[: m - max(count, number)]
            alone = set(range(m)) - {head for pair in fused for head in pair}
            groups = canonical([*fused, *((head,) for head in alone)])
        rounds.append(groups)
        heads = _merged(heads, groups)
    return rounds


def _merged(heads: Groups, groups: Groups) -> Groups:
    """The source heads of every head after a round."""
    return tuple(tuple(sorted(j for head in group for j in heads[head])) for group in groups)
