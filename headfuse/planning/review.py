"""Applies a reviewed plan."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

from headfuse.checkpoint.plan_file import read_plan
from headfuse.config.fuse import BudgetConfig, FuseConfig
from headfuse.errors import ConfigError
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS, slot_table
from headfuse.modeling.configuration_latent import layer_kinds
from headfuse.models.source import Source
from headfuse.plan import FusionPlan

logger = logging.getLogger(__name__)

_DECIDED = ("method", "layout", "max_positions")
"""Options that a plan decides as they are; beside these, the budget."""


def reviewed_plan(path: Path, source: Source, config: FuseConfig) -> tuple[FusionPlan, FuseConfig]:
    """A reviewed plan, and the options updated with what the plan decides: heads, method, layout.

    Raises:
        ConfigError: when it is for a model of another shape, or options were given that contradict it.
    """
    plan = read_plan(path)
    if plan.heads != source.heads:
        raise ConfigError(
            "the plan is for a model of another shape", where=path, fix="make one with `headfuse analyze`"
        )
    if plan.method not in FUSION_METHODS:
        raise ConfigError(f"unknown method {plan.method!r}", where=path, fix=f"choose from {', '.join(FUSION_METHODS)}")
    LAYOUTS[plan.layout].check(source.config)
    _check_kinds(plan, source, path)
    if plan.head_width is not None:
        slot_table.check(source.config)
    given = config.model_fields_set
    changed: list[str] = [name for name in _DECIDED if name in given and getattr(config, name) != getattr(plan, name)]
    if "budget" in given and not _keeps_the_same(config, plan):
        changed.append("budget")
    budget_given = sorted(config.budget.model_fields_set)
    changed += [f"budget.{name}" for name in budget_given if not _agrees(name, config.budget, plan)]
    if changed:
        raise ConfigError(
            f"the options contradict the plan in {', '.join(changed)}",
            where=path,
            fix="leave these options out, or make a plan with them: `headfuse analyze --output`",
        )
    if config.grouping != FuseConfig.model_fields["grouping"].default:
        logger.warning("The plan has the groups of heads: grouping %s is not used.", config.grouping)
    counts = plan.head_budget
    budget = BudgetConfig(key_heads=counts.key_heads, value_heads=counts.value_heads)
    if plan.layers[0].wide or LAYOUTS[plan.layout].wide:  # counts say nothing of widths
        total = str(Fraction(plan.kv_channels, plan.heads.kv_channels))
        budget = BudgetConfig(total=total, head_dim=plan.head_width)
    decided = {name: getattr(plan, name) for name in _DECIDED}
    return plan, config.model_copy(update={**decided, "budget": budget})


def _check_kinds(plan: FusionPlan, source: Source, path: Path) -> None:
    """Refuse a layer that reads one whose window or positions are of another kind."""
    if not plan.sources:
        return
    kinds = layer_kinds(source.config.get_text_config())
    for layer in plan.layers:
        other = [i for i in (*layer.key_sources, *layer.value_sources) if kinds[i] != kinds[layer.layer_idx]]
        if other:
            raise ConfigError(
                f"layer {layer.layer_idx} reads layer {other[0]}, which has another window, or other positions",
                where=path,
                fix="let layers read layers of their own kind",
            )


def _keeps_the_same(config: FuseConfig, plan: FusionPlan) -> bool:
    """Whether the share of the options is the one that the plan is named after; `_agrees` compares counts."""
    budget = config.budget
    return budget.shares is None or "total" not in budget.model_fields_set or budget.label == plan.budget


def _agrees(name: str, budget: BudgetConfig, plan: FusionPlan) -> bool:
    """Whether a plan has what an option beside the share asks for."""
    counts = plan.head_budget
    reach = max(len(sources) for layer in plan.layers for sources in (layer.key_sources, layer.value_sources))
    return {
        "keep_layers": all(i < len(plan.layers) and plan.layers[i].untouched for i in budget.keep_layers),
        "min_key_heads": min(counts.key_heads) >= budget.min_key_heads,
        "min_value_heads": min(counts.value_heads) >= budget.min_value_heads,
        "allocator": budget.allocator in ("auto", plan.allocator.split("+")[0]),
        "key_heads": budget.key_heads in (None, counts.key_heads),
        "value_heads": budget.value_heads in (None, counts.value_heads),
        "min_channels": min(*plan.key_channels, *plan.value_channels) >= (budget.min_channels or 0),
        "layerwise": not budget.layerwise or plan.key_channels == plan.value_channels,
        "head_dim": budget.head_dim in (None, "auto", plan.head_width),
        "cross_layer": not budget.cross_layer or 0 < reach <= budget.cross_layer,
    }.get(name, True)


def adopt(plan: FusionPlan, source: Source) -> FusionPlan:
    """The plan with this source in it; warns if it was measured on other weights of the same shape."""
    identity = source.identity()
    if plan.source.fingerprint != identity.fingerprint:
        logger.warning("the plan was made on other weights (%s): its groups may not suit these", plan.source.name)
    return plan.model_copy(update={"source": identity, "files": {}, "seal": None})
