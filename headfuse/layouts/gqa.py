"""`gqa`: a stock checkpoint of the source's own class, with fewer KV heads or with heads of another width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from headfuse.errors import UnsupportedModelError
from headfuse.layouts import slot_table
from headfuse.layouts.assignment import query_order
from headfuse.layouts.read_maps import folded
from headfuse.models.attention import AttentionWeights
from headfuse.models.families import architecture_of
from headfuse.plan import FusionPlan, LayerPlan


def config(source: dict[str, Any], plan: FusionPlan) -> dict[str, Any]:
    """The source's config.json with the new head count, and with the new width of heads where they have one."""
    count, slots = plan.head_budget.key_heads[0], plan.layers[0].rotary_slots
    if plan.head_width is None or slots is None:
        return {**source, "num_key_value_heads": count}
    from headfuse.models.config import config_of

    return {**slot_table.with_slot_table(source, config_of(source), slots[0]), "num_key_value_heads": count}


def check(config: Any) -> None:
    """Refuse a family whose own class has as many key heads and value heads as query heads.

    Raises:
        UnsupportedModelError: naming the layout that works.
    """
    if not architecture_of(config.model_type).stock_gqa:
        raise UnsupportedModelError(
            f"layout gqa does not exist for model_type {config.model_type!r}: its class has no num_key_value_heads",
            where="--layout",
            fix="choose --layout decoupled",
        )


def sized(weights: AttentionWeights, layer: LayerPlan, plan: FusionPlan) -> AttentionWeights:
    """Weights with the shapes that a layer of this plan is written with, but without data."""
    width, count = plan.head_width, len(layer.key_groups)
    if width is None:
        return weights.resized(count, len(layer.value_groups))

    def wide(tensor: Any, heads: int) -> Any:
        return None if tensor is None else tensor.new_empty((heads, width, *tensor.shape[2:]))

    queries = plan.heads.num_attention_heads
    return replace(
        weights,
        query=wide(weights.query, queries),
        query_bias=wide(weights.query_bias, queries),
        key=wide(weights.key, count),
        key_bias=wide(weights.key_bias, count),
        value=wide(weights.value, count),
        value_bias=wide(weights.value_bias, count),
        output=weights.output.new_empty((len(weights.output), queries, width)),
    )


def arrange(weights: AttentionWeights, layer: LayerPlan, plan: FusionPlan) -> AttentionWeights:
    """Permute the query heads so that those of one group are adjacent, as stock attention reads them."""
    if layer.rotary_slots is not None:
        weights = folded(weights, layer.key_groups, layer.rotary_slots[0], plan.heads)
    order = query_order(layer.key_groups, plan.heads)
    bias, norm, sinks = weights.query_bias, weights.query_norm, weights.sinks
    return replace(
        weights,
        query=weights.query[order],
        output=weights.output[:, order],
        query_bias=None if bias is None else bias[order],
        query_norm=norm if norm is None or len(norm) == 1 else norm[order],
        sinks=None if sinks is None else sinks[order],
    )
