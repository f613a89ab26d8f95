"""`gqa`: a stock checkpoint of the source's own class, with fewer KV heads."""

from __future__ import annotations

from typing import Any

from headfuse.architectures import AttentionWeights
from headfuse.plan import FusionPlan, LayerPlan, query_order


def config(source: dict[str, Any], plan: FusionPlan) -> dict[str, Any]:
    """The source's config.json with the new head count."""
    return {**source, "num_key_value_heads": plan.head_budget.key_heads[0]}


def arrange(weights: AttentionWeights, layer: LayerPlan, plan: FusionPlan) -> AttentionWeights:
    """Permute the query heads so that those of one group are adjacent, as stock attention reads them."""
    order = query_order(layer.key_groups, plan.heads)
    weights.query, weights.output = weights.query[order], weights.output[:, order]
    if weights.query_bias is not None:
        weights.query_bias = weights.query_bias[order]
    return weights
