"""`decoupled`: free head counts and maps per layer, with the model code beside the weights."""

from __future__ import annotations

from typing import Any

from headfuse.errors import UnsupportedModelError
from headfuse.layouts.assignment import head_of_query
from headfuse.models.attention import AttentionWeights
from headfuse.models.config import dtype_of
from headfuse.models.families import Architecture
from headfuse.plan import FusionPlan, LayerPlan


def config(source: dict[str, Any], plan: FusionPlan) -> dict[str, Any]:
    """A headfuse config.json with the source's nested in it."""
    from headfuse.modeling import AUTO_MAP

    budget = plan.head_budget
    slots = [layer.rotary_slots and [list(head) for head in layer.rotary_slots] for layer in plan.layers]
    return {
        "model_type": "headfuse",
        "architectures": ["HeadfuseForCausalLM"],
        "auto_map": dict(AUTO_MAP),
        "dtype": dtype_of(source),
        "headfuse_format": 1,
        "source_config": source,
        "num_key_heads": list(budget.key_heads),
        "num_value_heads": list(budget.value_heads),
        "key_head_of_query": [head_of_query(layer.key_groups, plan.heads) for layer in plan.layers],
        "value_head_of_query": [head_of_query(layer.value_groups, plan.heads) for layer in plan.layers],
        "rotary_slots": None if all(table is None for table in slots) else slots,
    }


def check(config: Any) -> None:
    """Refuse a family whose attention modules cannot be replaced.

    Raises:
        UnsupportedModelError: naming the layout that works.
    """
    from headfuse.modeling.configuration_family import FAMILIES

    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"layout decoupled has no model code for model_type {config.model_type!r}",
            where="--layout",
            fix=f"choose --layout gqa; decoupled exists for {', '.join(sorted(FAMILIES))}",
        )


def stored(arch: Architecture) -> Architecture:
    """Separate projections, and channels in the canonical order, whatever the source's class has."""
    return arch.decoupled()


def arrange(weights: AttentionWeights, layer: LayerPlan, plan: FusionPlan) -> AttentionWeights:
    """Return the weights unchanged: the maps are in the config."""
    return weights
