"""One layer of attention: keys, then values under the fused keys' attention, then the joint refit of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headfuse.fusion import FusionMethod
from headfuse.fusion.fold import fold
from headfuse.fusion.moments import key_moments, value_moments
from headfuse.fusion.normed_keys import fit_normed_keys
from headfuse.fusion.refit import FusedHeads, refit_output
from headfuse.models.attention import AttentionWeights
from headfuse.models.capture import AttentionCapture
from headfuse.plan import HeadLayout, LayerPlan


def fuse_layer(
    weights: AttentionWeights,
    captures: Sequence[AttentionCapture],
    layer: LayerPlan,
    heads: HeadLayout,
    method: FusionMethod,
) -> AttentionWeights:
    """Fuse one layer: keys first, then values under the fused keys' attention, then the joint refit of the output."""
    moments = key_moments(captures, heads)
    key_maps = method.key_maps(layer.key_groups, moments, layer.rotary_slots)
    keys = key_maps, layer.key_groups
    value_maps = method.value_maps(layer.value_groups, value_moments(captures, weights.output, heads, keys))
    refitted = weights
    if method.refits_output:
        fused_heads: FusedHeads = {"key": keys, "value": (value_maps, layer.value_groups)}
        refitted = replace(weights, output=refit_output(weights.output, captures, fused_heads))
    fused = fold(refitted, key_maps, value_maps, layer, heads)
    if method.refits_output and moments.normed and len(layer.key_groups) < heads.num_key_value_heads:
        return fit_normed_keys(weights, fused, key_maps, layer.key_groups, moments, captures, heads)
    return fused
