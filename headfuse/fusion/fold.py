"""Folding maps into weights: every method ends here."""

from __future__ import annotations

import torch

from headfuse.fusion.maps import HeadMaps
from headfuse.models.attention import AttentionWeights
from headfuse.plan import Groups, HeadLayout, LayerPlan


def fold(
    weights: AttentionWeights, key_maps: HeadMaps, value_maps: HeadMaps, layer: LayerPlan, heads: HeadLayout
) -> AttentionWeights:
    """Fold write maps into k and v and read maps into q and o; untouched heads are copied bit for bit.

    See mathematics.md section 2.2.
    """
    query, output = weights.query.double(), weights.output.double()
    query_bias = None if weights.query_bias is None else weights.query_bias.double()
    alone = {g[0] for g in layer.key_groups if len(g) == 1}, {g[0] for g in layer.value_groups if len(g) == 1}
    for h in range(heads.num_attention_heads):
        j = heads.source_head(h)
        if j not in alone[0]:
            query[h] = key_maps.read[j].T @ query[h]
            if query_bias is not None:
                query_bias[h] = key_maps.read[j].T @ query_bias[h]
        if j not in alone[1]:
            output[:, h] = output[:, h] @ value_maps.read[j]
    return AttentionWeights(
        query,
        _write(weights.key, key_maps, layer.key_groups),
        _write(weights.value, value_maps, layer.value_groups),
        output,
        query_bias,
        None if weights.key_bias is None else _write(weights.key_bias[..., None], key_maps, layer.key_groups)[..., 0],
        None
        if weights.value_bias is None
        else _write(weights.value_bias[..., None], value_maps, layer.value_groups)[..., 0],
        weights.output_bias,
        None if weights.query_norm is None else weights.query_norm.double(),
        None if weights.key_norm is None else _group_means(weights.key_norm.double(), layer.key_groups),
        weights.sinks,
    )


def _group_means(norm: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Mean norm weight of each group, `[n, d]` -> `[len(groups), d]`; a weight that all heads share is unchanged."""
    return norm if len(norm) == 1 else torch.stack([norm[list(group)].mean(0) for group in groups])


def _write(source: torch.Tensor, maps: HeadMaps, groups: Groups) -> torch.Tensor:
    source = source.double()
    fused = [
        source[group[0]]
        if len(group) == 1
        else torch.einsum("jab,jbD->aD", maps.write[list(group)], source[list(group)])
        for group in groups
    ]
    return torch.stack(fused)
