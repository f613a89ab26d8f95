"""`gqa`: a stock checkpoint of the source's own class, with fewer KV heads."""

from __future__ import annotations

from typing import Any

from headfuse.errors import UnsupportedModelError
from headfuse.models.attention import AttentionWeights
from headfuse.models.families import architecture_of
from headfuse.plan import FusionPlan, LayerPlan, query_order


def config(source: dict[str, Any], plan: FusionPlan) -> dict[str, Any]:
    """The source's config.json with the new head count."""
    return {**source, "num_key_value_heads": plan.head_budget.key_heads[0]}


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


def arrange(weights: AttentionWeights, layer: LayerPlan, plan: FusionPlan) -> AttentionWeights:
    """Permute the query heads so that those of one group are adjacent, as stock attention reads them."""
    order = query_order(layer.key_groups, plan.heads)
    weights.query, weights.output = weights.query[order], weights.output[:, order]
    if weights.query_bias is not None:
        weights.query_bias = weights.query_bias[order]
    if weights.query_norm is not None and len(weights.query_norm) > 1:
        weights.query_norm = weights.query_norm[order]
    return weights
