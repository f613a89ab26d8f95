"""Source layers with some heads fused, on the text that they are measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from headfuse.choices import Side
from headfuse.fusion.maps import Reconstruction
from headfuse.fusion.refit import FusedHeads
from headfuse.fusion.wide_layer import WideKeys
from headfuse.models.attention import AttentionWeights
from headfuse.models.capture import AttentionCapture, ReconstructedKeys
from headfuse.models.streamed import StreamedModel
from headfuse.plan import Groups

PROBE_COST = 2.0
"""Cost of all end-loss probes together, in forward passes over the calibration text; it decides how many tokens they
see.
"""
FAST_PROBE_COST = 0.5
"""This cost in preset `fast`, which measures end losses of wide heads only."""
WEIGHED = 1 / 16
"""Share of the calibration tokens that is used to weigh keys against values."""
PROBE_LENGTH = 128
"""Tokens in a probe's window: several short texts are more informative than one long text."""
ROWS_PER_UNKNOWN = 4
"""Rows of text for a refit that only estimates a cost, per column of the output projection."""
Costs = dict[tuple[int, Side], dict[int, float]]
"""Cost of each measured count, for each layer and side."""
Fused = Mapping[tuple[Side, int], tuple[Reconstruction, Groups]]
"""Maps and groups of each `(side, count)` with fewer heads than the source; of wide heads, with fewer quanta."""


def probe_tokens(tokens: float, layers: int, counts: int, cost: float = PROBE_COST) -> int:
    """Tokens that each of `2 * layers * counts` probes may see, at a total cost in forward passes; a probe takes half
    of one on average."""
    return max(64, int(cost * tokens / max(1, layers * counts)))


def weighing_tokens(tokens: int) -> int:
    """Tokens for the two models whose end losses weigh keys against values."""
    return max(64, int(WEIGHED * tokens))


def probe_windows(windows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Beginnings of windows `[k, T]`, about `tokens` tokens in all; longer ones if there are too few windows."""
    used = min(len(windows), max(1, round(tokens / PROBE_LENGTH)))
    return windows[:used, : tokens // used]


def captures_for_refit(captures: Sequence[AttentionCapture], output: torch.Tensor) -> Sequence[AttentionCapture]:
    """All start windows, plus enough ordinary windows to refit `output [D, n_q, d]` for a cost."""
    rows, enough = 0, list[AttentionCapture]()
    for capture in captures:
        if capture.weight != 1 or rows < ROWS_PER_UNKNOWN * output[0].numel():
            enough.append(capture)
            rows += capture.output.shape[:2].numel() if capture.weight == 1 else 0
    return enough


@dataclass(frozen=True)
class Variant:
    """A source layer with some heads fused, as the source's own class computes it."""

    tensors: Mapping[str, torch.Tensor]
    """In the source's shapes; names relative to the layer."""
    keys: ReconstructedKeys | None = None
    """What reconstructs the keys of its attention, where tensors cannot: wide keys are made of normed ones."""


def with_heads(
    tensors: Mapping[str, torch.Tensor],
    streamed: StreamedModel,
    fused: FusedHeads,
    output: torch.Tensor | None = None,
) -> Variant:
    """A source layer, with keys, values or both replaced by their reconstruction from fused heads.

    It has the source's shapes, so the source's own class computes the fused layer: read maps of keys commute with
    RoPE. `output [D, n_q, d]`, if given, replaces the output projection.
    """
    weights = streamed.attention_weights(tensors)
    keys: ReconstructedKeys | None = None
    for side, (maps, groups) in fused.items():
        if side == "key" and weights.key_norm is not None and isinstance(maps, WideKeys):
            keys = partial(maps.reconstruct, groups=groups)
        else:
            weights = reconstructed(weights, side, maps, groups)
    if output is not None:
        weights = replace(weights, output=output)
    return Variant(weights.in_layer(tensors, streamed.arch, streamed.heads), keys)


def reconstructed(weights: AttentionWeights, side: Side, maps: Reconstruction, groups: Groups) -> AttentionWeights:
    """A source layer's weights, with the heads of one side replaced by their reconstruction from fused heads."""

    def back(weight: torch.Tensor) -> torch.Tensor:
        return maps.reconstruct(weight.double().mT, groups).mT.float()

    bias = weights.key_bias if side == "key" else weights.value_bias
    bias = None if bias is None else back(bias[..., None])[..., 0]
    if side == "key":
        return replace(weights, key=back(weights.key), key_bias=bias)
    return replace(weights, value=back(weights.value), value_bias=bias)
