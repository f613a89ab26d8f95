"""`gqa`: a stock checkpoint of the source's own class, with fewer KV heads."""

from __future__ import annotations

from dataclasses import replace
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
    bias, norm = weights.query_bias, weights.query_norm
    return replace(
        weights,
        query=weights.query[order],
        output=weights.output[:, order],
        query_bias=None if bias is None else bias[order],
        query_norm=norm if norm is None or len(norm) == 1 else norm[order],
    )
