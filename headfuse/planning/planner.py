"""From calibration text to a plan: survey of the heads -> budget -> groups."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import headfuse
from headfuse.choices import Layout, Side
from headfuse.config.fuse import FuseConfig
from headfuse.config.presets import PRESETS
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS
from headfuse.models.placement import factories_on
from headfuse.models.rope import slow_planes
from headfuse.models.source import Source
from headfuse.models.source_layer import SourceLayer
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan, HeadLayout, LayerPlan
from headfuse.planning.allocators import ALLOCATORS
from headfuse.planning.budget import BudgetRules, budget_rules
from headfuse.planning.comparison import COMPARED_WINDOWS, FITTED_WINDOWS, NEGLIGIBLE, best_plan
from headfuse.planning.costs import CostTable, cost_row, measured_counts
from headfuse.planning.cross_layer import with_sources
from headfuse.planning.end_loss_probes import EndLossProbes
from headfuse.planning.error_probes import WIDE_ERRORS_WORTH, ErrorProbes
from headfuse.planning.fused_variants import (
    FAST_PROBE_COST,
    PROBE_COST,
    Costs,
    probe_tokens,
    probe_windows,
    weighing_tokens,
)
from headfuse.planning.importance import HEAD_IMPORTANCE, cost_table
from headfuse.planning.survey import LayerSurvey, SurveyOptions, survey_layer
from headfuse.planning.wide_survey import one_width_plans, survey_wide_layer, wide_layer_plan
from headfuse.planning.widths import measured_widths
from headfuse.text.calibration import START_WEIGHT, CalibrationText

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]
"""Called with a phase, the layers done and all layers."""
SURVEYED = 1 / 3
"""Share of the statistics windows that the survey reads: a quarter of all windows by default."""
WIDE_PROBE_TOKENS, WIDE_PROBE_TOKENS_PER_LAYER = 96, 16
"""Fewest tokens for measuring end losses of widths, in all and for each layer of the model. Fewer give noise compared
with the errors, at twice the cost (docs/experiments/wide-heads.md, widths-of-deep-models.md)."""


@dataclass(frozen=True)
class PlanOptions:
    """Options that decide a plan, besides the text and the model."""

    rules: BudgetRules
    budget: str
    """Its name in the plan."""
    allocator: str
    """Name in ALLOCATORS."""
    against: tuple[str, ...]
    """Others, whose plans are compared with the allocator's; the last one's is taken in doubt. Empty: none are."""
    method: str
    """Name in FUSION_METHODS."""
    layout: Layout
    grouping: str
    """Name in GROUPERS."""
    end_loss_probes: Literal["few", "all"] | None
    """Counts whose cost is also measured by the end loss, set by the preset; for wide heads, some always are."""
    probe_cost: float
    """Total cost of the end-loss measurements, in forward passes over the calibration text."""
    seed: int
    reach: int = 0
    """How many layers before it a layer reads."""
    max_positions: int | None = None
    """Of the fused model; None: the source's."""


def plan_options(config: FuseConfig) -> PlanOptions:
    """The plan options among the options of `fuse`."""
    layout, allocator = LAYOUTS[config.layout], config.budget.allocator
    first, *others = ALLOCATORS[allocator].candidates or (allocator,)
    return PlanOptions(
        rules=budget_rules(config.budget, layout.shared_partition, layout.one_count, layout.wide),
        budget=config.budget.label,
        allocator=first,
        against=tuple(others) if layout.wide else (),
        method=config.method,
        layout=config.layout,
        grouping=config.grouping,
        end_loss_probes=PRESETS[config.preset].end_loss_probes or ("few" if layout.wide else None),
        probe_cost=PROBE_COST if PRESETS[config.preset].end_loss_probes else FAST_PROBE_COST,
        seed=config.seed,
        reach=config.budget.cross_layer or 0,
        max_positions=config.max_positions,
    )


@dataclass(frozen=True)
class Survey:
    """What a survey measured of every layer, and the costs that the allocator reads."""

    layers: tuple[LayerSurvey, ...]
    costs: CostTable | None
    """None where the allocator reads none, or the budget leaves no choice."""
    measured: tuple[tuple[float, Costs], ...]
    """The measurements behind the costs of fusing, each with its weight: errors, then end losses."""


def survey(
    streamed: StreamedModel,
    text: CalibrationText,
    options: PlanOptions,
    on_progress: ProgressCallback,
    on_layer: Callable[[SourceLayer], None] = lambda layer: None,
    *,
    every_cost: bool = False,
    pairs: bool = False,
) -> Survey:
    """Run the source once over a part of the text and measure every layer's heads.

    Args:
        streamed: the source.
        text: the calibration text.
        options: what decides the plan.
        on_progress: called with `survey`, the layers done and all layers; then with `probes`, likewise of windows.
        on_layer: called with every layer of the source on its way.
        every_cost: measure costs even where the budget leaves the allocator no choice.
        pairs: measure what pairs of heads share even where no groups are chosen by it.
    """
    part, heads = text.part(SURVEYED), streamed.heads
    read = every_cost or options.rules.leave_a_choice(heads)
    costs = ALLOCATORS[options.allocator].costs if read else "none"
    measures, layers = _survey_options(options, heads, costs == "measured"), list[LayerSurvey]()
    probes = _probes(streamed, text, options) if measures.costs else ()
    few = measured_counts(heads.num_key_value_heads, False)
    quantum = options.rules.channels(heads) if LAYOUTS[options.layout].wide else None
    for layer in streamed.walk([streamed.embed(part.statistics), streamed.embed(part.starts, START_WEIGHT)]):
        with factories_on(streamed.device):
            if quantum is None:
                surveyed, fused = survey_layer(layer.captures, layer.weights.output, heads, measures)
            else:
                slow = slow_planes(streamed.config, layer.index, options.max_positions)
                surveyed, fused = survey_wide_layer(
                    layer.captures, layer.weights.output, heads, quantum, measures.costs, pairs, slow
                )
        for probe in probes:
            every = measures.shared_partition or quantum is not None or probe.every_count
            probe.advance(layer, {place: maps for place, maps in fused.items() if every or place[1] in few})
        on_layer(layer)
        layers.append(surveyed)
        del fused  # not beside the next layer
        on_progress("survey", layer.index + 1, streamed.num_layers)
    measured = tuple((probe.worth, probe.costs(partial(on_progress, "probes"))) for probe in probes)
    table = _measured_costs(layers, measured) if measured else None
    if costs == "importance":
        table = cost_table(HEAD_IMPORTANCE[options.allocator](streamed, part.statistics, options.seed))
    return Survey(tuple(layers), table, measured)


def _survey_options(options: PlanOptions, heads: HeadLayout, costs: bool) -> SurveyOptions:
    """What is measured of every layer, with the costs of fusing or without."""
    layout, method = LAYOUTS[options.layout], FUSION_METHODS[options.method]
    return SurveyOptions(
        method,
        options.grouping,
        slots=layout.free_slots and method.slots is not None,
        shared_partition=layout.shared_partition,
        costs=costs,
        every_count=options.end_loss_probes == "all",
        one_width=None if options.rules.head_dim is None else options.rules.one_width(heads)[0],
    )


def _measured_costs(layers: list[LayerSurvey], measured: tuple[tuple[float, Costs], ...]) -> CostTable:
    """The cost table from lost energies and measurements."""

    def rows(side: Side) -> list[list[float]]:
        return [
            cost_row(layer.lost[side], [(worth, costs[i, side]) for worth, costs in measured if (i, side) in costs])
            for i, layer in enumerate(layers)
        ]

    return CostTable(rows("key"), rows("value"))


def _probes(
    streamed: StreamedModel, text: CalibrationText, options: PlanOptions
) -> tuple[ErrorProbes] | tuple[ErrorProbes, EndLossProbes]:
    """The preset's measurements, on as many tokens as it can afford; no survey is fitted to their text."""
    heads, equal = streamed.heads, options.rules.allocate("uniform", streamed.heads)
    unseen, tokens = text.after(text.part(SURVEYED)), text.statistics.numel()
    unseen = unseen if len(unseen) else text.statistics
    refit = FUSION_METHODS[options.method].refits_output
    full = options.rules.counted(heads)
    errors = ErrorProbes(streamed, probe_windows(unseen, weighing_tokens(tokens)), equal, refit, full)
    if LAYOUTS[options.layout].wide:
        errors.worth, errors.every_refit = WIDE_ERRORS_WORTH, False
    if options.end_loss_probes is None:
        return (errors,)
    wide = LAYOUTS[options.layout].wide
    counts = len(measured_widths(full) if wide else measured_counts(full, options.end_loss_probes == "all"))
    seen = probe_tokens(tokens, streamed.num_layers, counts, options.probe_cost)
    if wide and seen < enough_for_end_losses(streamed.num_layers):
        return (errors,)
    return errors, EndLossProbes(streamed, probe_windows(unseen, seen), equal, refit, full)


def enough_for_end_losses(num_layers: int) -> int:
    """Fewest tokens of a probe for end losses of widths: the more layers, the more costs there are to be wrong."""
    return max(WIDE_PROBE_TOKENS, WIDE_PROBE_TOKENS_PER_LAYER * num_layers)


def plan_model(
    source: Source,
    streamed: StreamedModel,
    text: CalibrationText,
    options: PlanOptions,
    found: Survey,
    on_progress: ProgressCallback,
) -> FusionPlan:
    """The plan of a surveyed model, compared with another one where that is in doubt, with the layers that are read.

    Args:
        source: the opened source.
        streamed: the same, layer by layer.
        text: the calibration text.
        options: what decides the plan.
        found: the survey.
        on_progress: called with `compare` or `sources`, the layers done and all layers.
    """
    plan, part = make_plan(source, options, found), text.part(SURVEYED)
    unseen = text.after(part)[-COMPARED_WINDOWS:]
    if options.against and len(unseen) > 1 and _in_doubt(options, source.heads, found):
        plans = [plan, *(make_plan(source, replace(options, allocator=name), found) for name in options.against)]
        fitted = text.part(min(SURVEYED, FITTED_WINDOWS / len(text.statistics)))
        slow = [slow_planes(streamed.config, i, options.max_positions) for i in range(streamed.num_layers)]
        plan = best_plan(plans, streamed, fitted, unseen, slow, on_progress)
    return with_sources(plan, streamed, part, options.reach, on_progress) if options.reach else plan


def _in_doubt(options: PlanOptions, heads: HeadLayout, found: Survey) -> bool:
    """Whether another plan may lose less: there was a choice, and the allocator's is expected to lose something."""
    if found.costs is None:
        return False
    expected = found.costs.of(options.rules.allocate(options.allocator, heads, found.costs))
    logger.debug("%s is expected to lose %.4f nats per token", options.allocator, expected)
    return expected > NEGLIGIBLE


def make_plan(source: Source, options: PlanOptions, found: Survey) -> FusionPlan:
    """Budget and groups -> the plan of every layer."""
    allocator = options.allocator if found.costs else "uniform"  # without a choice they all agree
    budget = options.rules.allocate(allocator, source.heads, found.costs)
    counts = zip(budget.key_heads, budget.value_heads, found.layers, strict=True)
    if options.rules.head_dim is not None:
        layers = one_width_plans(found.layers, *options.rules.one_width(source.heads))
    elif LAYOUTS[options.layout].shared_partition:
        groups = [layer.shared_groups[keys] for keys, _, layer in counts]
        layers = [LayerPlan(layer_idx=i, key_groups=each, value_groups=each) for i, each in enumerate(groups)]
    elif LAYOUTS[options.layout].wide:
        quantum = options.rules.channels(source.heads)
        layers = [wide_layer_plan(i, layer, keys, values, quantum) for i, (keys, values, layer) in enumerate(counts)]
    else:
        layers = [
            LayerPlan(
                layer_idx=i,
                key_groups=layer.key_groups[keys - 1],
                value_groups=layer.value_groups[values - 1],
                rotary_slots=layer.key_slots[keys - 1],
            )
            for i, (keys, values, layer) in enumerate(counts)
        ]
    return plan_of(source, options, layers)


def plan_of(source: Source, options: PlanOptions, layers: list[LayerPlan]) -> FusionPlan:
    """The plan of these layers, with its provenance."""
    return FusionPlan(
        headfuse_version=headfuse.__version__,
        source=source.identity(),
        heads=source.heads,
        layout=options.layout,
        method=options.method,
        allocator=options.allocator,
        budget=options.budget,
        max_positions=options.max_positions,
        layers=tuple(layers),
    )
