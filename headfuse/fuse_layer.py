"""One layer of attention: keys, then values under the fused keys' attention, then the joint refit of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from headfuse.architectures import AttentionWeights
from headfuse.calibration import key_moments, value_moments
from headfuse.fusion import FusionMethod
from headfuse.fusion.fold import fold
from headfuse.fusion.maps import HeadMaps
from headfuse.normed_keys import fit_normed_keys
from headfuse.plan import Groups, HeadLayout, LayerPlan
from headfuse.streaming import AttentionCapture

REFIT_RIDGE = 1.0
"""Ridge of the refit, in units of the mean diagonal times unknowns per row: what as many rows say of noise alone."""

FusedHeads = Mapping[str, tuple[HeadMaps, Groups]]
"""Maps and groups of `key`, `value` or both: the sides that are fused."""


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
        fused_heads = {"key": keys, "value": (value_maps, layer.value_groups)}
        refitted = replace(weights, output=refit_output(weights.output, captures, fused_heads))
    fused = fold(refitted, key_maps, value_maps, layer, heads)
    if method.refits_output and moments.normed and len(layer.key_groups) < heads.num_key_value_heads:
        fit_normed_keys(weights, fused, key_maps, layer.key_groups, moments, captures, heads)
    return fused


def reconstructed_outputs(capture: AttentionCapture, fused: FusedHeads) -> torch.Tensor:
    """Head outputs `[B, n_q, T, d]` with what fused heads give back in place of keys, values or both."""

    def left(side: str, source: torch.Tensor) -> torch.Tensor:
        return fused[side][0].reconstruct(source, fused[side][1]) if side in fused else source

    return capture.attend(left("key", capture.key), left("value", capture.value))


def refit_output(output: torch.Tensor, captures: Sequence[AttentionCapture], fused: FusedHeads) -> torch.Tensor:
    """The source's output projection refitted to what fused heads give back of keys, values or both.

    The least squares are those of the source's head outputs on the reconstructed ones, shrunk towards the identity:
    the map `I + M` that they give is the best one under any output projection `W`, so `W (I + M)` is the best of those
    (mathematics.md section 4.5).

    Args:
        output: output projection of the source `[D, n_q, d]`.
        captures: the layer on calibration windows.
        fused: maps and groups of the sides that are fused.

    Returns:
        `[D, n_q, d]`, float64.
    """

    def rows(capture: AttentionCapture) -> tuple[torch.Tensor, torch.Tensor]:
        z = reconstructed_outputs(capture, fused).transpose(1, 2).flatten(2).flatten(0, 1)  # [B T, n_q d]
        # a difference of head outputs, not of two products: it vanishes on heads that are truly redundant
        return z, capture.output.flatten(2).flatten(0, 1) - z

    count, size = sum(capture.output.shape[:2].numel() for capture in captures), output[0].numel()
    wanted = output.double().flatten(1)
    if count < size:  # the same solution from the smaller Gram matrix
        pairs = [[x * capture.weight**0.5 for x in rows(capture)] for capture in captures]
        z, missing = (torch.cat(part) for part in zip(*pairs, strict=True))
        gram = (z @ z.T).double().cpu()
        gram.diagonal().add_((REFIT_RIDGE * gram.diagonal().mean()).clamp_min(1e-300))
        lost = (missing @ wanted.T.to(missing)).double().cpu()
        change = torch.linalg.solve(gram, lost).T.to(z) @ z
        return (wanted + change.to(wanted)).view_as(output)
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    for capture in captures:
        z, missing = rows(capture)
        gram += capture.weight * (z.T @ z).double().cpu()
        cross += capture.weight * (z.T @ missing).double().cpu()
    gram.diagonal().add_((REFIT_RIDGE * size / count * gram.diagonal().mean()).clamp_min(1e-300))
    return (wanted + torch.linalg.solve(gram, cross @ wanted.T).T).view_as(output)
