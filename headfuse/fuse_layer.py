"""One layer of attention: keys, then values under the fused keys' attention, then the joint refit of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from headfuse.architectures import AttentionWeights
from headfuse.calibration import key_moments, value_moments
from headfuse.fusion import FusionMethod
from headfuse.fusion.fold import fold
from headfuse.fusion.maps import HeadMaps
from headfuse.normed_keys import fit_normed_keys
from headfuse.plan import Groups, HeadLayout, LayerPlan, head_of_source
from headfuse.streaming import AttentionCapture

REFIT_RIDGE = 1.0
"""Ridge of the refit, in units of the mean diagonal times unknowns per row: what as many rows say of noise alone."""
ROWS_PER_UNKNOWN = 4
"""Rows of text behind a refit that only tells what a count costs, for each number in a row of the projection."""

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
    fused_keys = (key_maps, layer.key_groups)
    value_maps = method.value_maps(layer.value_groups, value_moments(captures, weights.output, heads, fused_keys))
    fused = fold(weights, key_maps, value_maps, layer, heads)
    if method.refits_output and moments.normed and len(layer.key_groups) < heads.num_key_value_heads:
        fit_normed_keys(weights, fused, key_maps, layer.key_groups, moments, captures, heads)
    if method.refits_output:
        fused.output = refit_output(weights.output, fused.output, captures, fused_keys, value_maps, layer, heads)
    return fused


def refit_output(
    source: torch.Tensor,
    folded: torch.Tensor,
    captures: Sequence[AttentionCapture],
    fused_keys: tuple[HeadMaps, Groups],
    value_maps: HeadMaps,
    layer: LayerPlan,
    heads: HeadLayout,
) -> torch.Tensor:
    """Least squares of the layer's attention output on the fused heads' outputs, shrunk towards `folded` (math.md 2).

    Args:
        source: output projection of the source `[D, n_q, d]`.
        folded: closed-form solution `[D, n_q, d]`, float64.
        captures: the layer on the calibration windows.
        fused_keys: maps and groups of the keys.
        value_maps: maps of the values.
        layer: the plan of the layer.
        heads: the source's heads.
    """
    owner = head_of_source(layer.value_groups)

    def head_outputs(capture: AttentionCapture) -> torch.Tensor:
        values = value_maps.fuse(capture.value, layer.value_groups)[:, owner]
        attention = capture.probabilities(fused_keys[0].reconstruct(capture.key, fused_keys[1]))
        return attention @ values.repeat_interleave(heads.queries_per_head, dim=1)

    return least_squares_output(source, folded, captures, head_outputs)


def refit_source(
    output: torch.Tensor, captures: Sequence[AttentionCapture], fused: FusedHeads, heads: HeadLayout
) -> torch.Tensor:
    """The source's output projection `[D, n_q, d]` refitted to what fused heads give back of keys, values or both.

    Args:
        output: output projection of the source `[D, n_q, d]`.
        captures: the layer on calibration windows; of the long ones as many are read as such a fit needs.
        fused: maps and groups of the sides that are fused.
        heads: the source's heads.
    """
    rows, enough = 0, list[AttentionCapture]()
    for capture in captures:
        if capture.weight != 1 or rows < ROWS_PER_UNKNOWN * output[0].numel():
            enough.append(capture)
            rows += capture.output.shape[:2].numel() if capture.weight == 1 else 0
    return least_squares_output(output, output, enough, lambda c: reconstructed_outputs(c, fused, heads)).float()


def reconstructed_outputs(capture: AttentionCapture, fused: FusedHeads, heads: HeadLayout) -> torch.Tensor:
    """Head outputs `[B, n_q, T, d]` with what fused heads give back in place of keys, values or both."""

    def left(side: str, source: torch.Tensor) -> torch.Tensor:
        return fused[side][0].reconstruct(source, fused[side][1]) if side in fused else source

    value = left("value", capture.value).repeat_interleave(heads.queries_per_head, dim=1)
    return capture.probabilities(left("key", capture.key)) @ value


def least_squares_output(
    source: torch.Tensor,
    start: torch.Tensor,
    captures: Sequence[AttentionCapture],
    head_outputs: Callable[[AttentionCapture], torch.Tensor],
) -> torch.Tensor:
    """The output projection `[D, n_q, d]` that gives the layer's attention output from changed heads (math.md 2).

    Args:
        source: output projection of the source `[D, n_q, d]`.
        start: what the ridge shrinks towards, `[D, n_q, d]`.
        captures: the layer on the calibration windows.
        head_outputs: of a capture, what the changed heads put out, `[B, n_q, T, d]`.
    """
    start, wanted = start.double(), source.double().flatten(1)

    def rows(capture: AttentionCapture) -> tuple[torch.Tensor, torch.Tensor]:
        z = head_outputs(capture).transpose(1, 2).flatten(2).flatten(0, 1)  # [B T, n_q d]
        target = capture.output.flatten(2).flatten(0, 1)
        # the residual itself, not a difference of two products: it vanishes on heads that are truly redundant
        return z, target @ wanted.to(target).T - z @ start.flatten(1).to(z).T  # [B T, D]

    count, (width, size) = sum(capture.output.shape[:2].numel() for capture in captures), wanted.shape
    if count < size:  # the same solution from the smaller Gram matrix
        pairs = [[x * capture.weight**0.5 for x in rows(capture)] for capture in captures]
        z, missing = (torch.cat(part) for part in zip(*pairs, strict=True))
        gram = (z @ z.T).double().cpu()
        gram.diagonal().add_((REFIT_RIDGE * gram.diagonal().mean()).clamp_min(1e-300))
        change = torch.linalg.solve(gram, missing.double().cpu()).T @ z.double().cpu()
        return start + change.view_as(start)
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(width, size, dtype=torch.float64)
    for capture in captures:
        z, missing = rows(capture)
        gram += capture.weight * (z.T @ z).double().cpu()
        cross += capture.weight * (missing.T @ z).double().cpu()
    gram.diagonal().add_((REFIT_RIDGE * size / count * gram.diagonal().mean()).clamp_min(1e-300))
    return start + torch.linalg.solve(gram, cross.T).T.view_as(start)
