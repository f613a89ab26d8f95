"""From calibration text to a plan: survey of the heads -> budget -> groups."""

from __future__ import annotations

import logging
from collections.abc import Callable

import headfuse
from headfuse.config.fuse import FuseConfig
from headfuse.config.presets import PRESETS
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS
from headfuse.models.attention import AttentionWeights
from headfuse.models.capture import AttentionCapture
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import SHARED_PARTITION, FusionPlan, HeadBudget, HeadLayout, LayerPlan
from headfuse.planning.budget import budget_rules
from headfuse.planning.costs import SideCosts, measured_counts
from headfuse.planning.end_loss_probes import EndLossProbes
from headfuse.planning.error_probes import ErrorProbes
from headfuse.planning.fused_variants import probe_tokens, probe_windows, weighing_tokens
from headfuse.planning.importance import HEAD_IMPORTANCE, coalition_tokens, cost_rows
from headfuse.planning.survey import LayerSurvey, survey_layer
from headfuse.text.calibration import START_WEIGHT, CalibrationText

logger = logging.getLogger(__name__)
ProgressCallback = Callable[[str, int, int], None]
"""Called with a phase, the layers done and all layers."""
SURVEYED = 1 / 3
"""Share of the statistics windows that the survey reads: a quarter of all windows by default."""


def check_budget(config: FuseConfig, source: Source) -> HeadBudget:
    """A plan-free allocation, which refuses what cannot work before any heavy step.

    Raises:
        UnsupportedModelError: when the layout cannot hold this model.
        BudgetError: saying which budget works.
    """
    LAYOUTS[config.layout].check(source.config)
    rules, heads = budget_rules(config), source.heads
    return rules.allocate_gqa(heads) if config.layout == "gqa" else rules.allocate("uniform", heads)


def survey(
    source: Source, streamed: StreamedModel, text: CalibrationText, config: FuseConfig, on_progress: ProgressCallback
) -> list[LayerSurvey]:
    """Run the source once over a part of the text and measure every layer's heads."""
    part = text.part(SURVEYED)
    windows, starts = streamed.embed(part.statistics), streamed.embed(part.starts, START_WEIGHT)
    method, allocator, surveys = FUSION_METHODS[config.method], config.budget.allocator, list[LayerSurvey]()
    needed = _needs_costs(config, source.heads)
    costs = needed and allocator not in HEAD_IMPORTANCE
    slots = LAYOUTS[config.layout].free_slots and method.slots is not None
    preset = PRESETS[config.preset]
    shared = config.layout in SHARED_PARTITION
    errors, end_losses = _probes(source, streamed, text, config) if costs else (None, None)
    every, few = preset.end_loss_probes == "all", measured_counts(source.heads.num_key_value_heads, False)
    for layer_idx in range(streamed.num_layers):
        tensors, captures, inputs = streamed.layer_tensors(layer_idx), list[AttentionCapture](), windows.hidden
        with streamed.layer(layer_idx, tensors) as run:
            windows, starts = run(windows, captures), run(starts, captures)
        output = AttentionWeights.of_layer(tensors, streamed.arch, source.heads).output
        layer = survey_layer(captures, output, source.heads, method, config.grouping, costs, slots, every, shared)
        fused = {(side, c): maps for side, row in layer.costs.items() for c, maps in row.maps.items()}
        if errors is not None:
            some = {(side, c): maps for (side, c), maps in fused.items() if shared or c in few}
            errors.advance(layer_idx, tensors, some, captures, inputs)
        if end_losses is not None:
            end_losses.advance(layer_idx, tensors, fused, captures if method.refits_output else ())
        for row in layer.costs.values():
            row.maps.clear()
        surveys.append(layer)
        on_progress("survey", layer_idx + 1, streamed.num_layers)
    probes: list[ErrorProbes | EndLossProbes] = [each for each in (errors, end_losses) if each is not None]
    for each in probes:
        for (layer_idx, side), found in each.costs().items():
            surveys[layer_idx].costs[side].measured.append((each.worth, found))
    if needed and allocator in HEAD_IMPORTANCE:
        seen = coalition_tokens(part.statistics, source.heads) if allocator == "shapley" else part.statistics
        rows = cost_rows(HEAD_IMPORTANCE[allocator](streamed, seen, source.heads, config.seed))
        for index, scores in enumerate(rows):
            side = ("key", "value")[index // len(surveys)]
            surveys[index % len(surveys)].costs[side] = SideCosts(scores, {}, [(1.0, dict(enumerate(scores, start=1)))])
    return surveys


def _probes(
    source: Source, streamed: StreamedModel, text: CalibrationText, config: FuseConfig
) -> tuple[ErrorProbes, EndLossProbes | None]:
    """Those of the preset, on as many tokens as it can pay for, of text that nothing in the survey is fitted to."""
    preset, equal = PRESETS[config.preset], budget_rules(config).allocate("uniform", source.heads)
    used, tokens = len(text.part(SURVEYED).statistics), text.statistics.numel()
    unseen = text.statistics[used:] if used < len(text.statistics) else text.statistics
    refit = FUSION_METHODS[config.method].refits_output
    errors = ErrorProbes(streamed, probe_windows(unseen, weighing_tokens(tokens)), equal, refit)
    if preset.end_loss_probes is None:
        return errors, None
    counts = len(measured_counts(source.heads.num_key_value_heads, preset.end_loss_probes == "all"))
    seen = probe_windows(unseen, probe_tokens(tokens, streamed.num_layers, counts))
    return errors, EndLossProbes(streamed, seen, equal)


def _needs_costs(config: FuseConfig, heads: HeadLayout) -> bool:
    """Whether the allocator reads a cost table."""
    return (
        config.budget.allocator != "uniform" and config.layout != "gqa" and budget_rules(config).leave_a_choice(heads)
    )


def make_plan(source: Source, config: FuseConfig, surveys: list[LayerSurvey]) -> FusionPlan:
    """Budget and groups -> the plan of every layer."""
    heads, rules = source.heads, budget_rules(config)
    table = [s.costs[side].row() for side in ("key", "value") for s in surveys if s.costs]
    allocator = config.budget.allocator if table else "uniform"  # without a choice they all agree
    budget = rules.allocate_gqa(heads) if config.layout == "gqa" else rules.allocate(allocator, heads, table)
    if config.layout in SHARED_PARTITION:
        layers = [
            LayerPlan(layer_idx=i, key_groups=groups, value_groups=groups)
            for i, groups in enumerate(s.shared_groups[budget.key_heads[i]] for i, s in enumerate(surveys))
        ]
    else:
        layers = [
            LayerPlan(
                layer_idx=i,
                key_groups=s.key_groups[budget.key_heads[i] - 1],
                value_groups=s.value_groups[budget.value_heads[i] - 1],
                rotary_slots=s.key_slots[budget.key_heads[i] - 1],
            )
            for i, s in enumerate(surveys)
        ]
    return FusionPlan(
        headfuse_version=headfuse.__version__,
        source=source.identity(),
        heads=heads,
        layout=config.layout,
        method=config.method,
        allocator=config.budget.allocator,
        budget=config.budget.label,
        layers=tuple(layers),
    )
