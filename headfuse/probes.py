"""Probes of the end loss: KL(source || source with one side of one layer fused), for the cost table of the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from headfuse.architectures import AttentionWeights
from headfuse.distillation import kl_divergence
from headfuse.fusion.maps import HeadMaps
from headfuse.plan import Groups
from headfuse.streaming import HiddenStates, StreamedModel

PROBE_COST = 2.0
"""Price of all probes together, in forward passes over the calibration text; it decides how many tokens they see."""
READ_TOKENS = 4
"""One in so many tokens enters the divergence: reading logits costs more than it tells."""


@dataclass(frozen=True)
class Probe:
    """One side of one layer fused to `count` heads, and the divergence that it caused in the end."""

    layer_idx: int
    side: str
    count: int
    divergence: float


def probe_tokens(tokens: float, layers: int, counts: int) -> int:
    """How many tokens each of `2 layers counts` probes may see; a probe costs half a forward pass on average."""
    return max(64, int(PROBE_COST * tokens / max(1, layers * counts)))


class EndLossProbes:
    """Hidden states of fused variants on their way through the source's remaining layers (math.md 4).

    All variants advance together, so every layer is loaded once.

    Args:
        streamed: the source.
        windows: the tokens that the probes see, `[k, T]`.
    """

    def __init__(self, streamed: StreamedModel, windows: torch.Tensor) -> None:
        self.streamed, self.windows = streamed, windows
        self.source = streamed.embed(windows)
        self.variants: list[tuple[int, str, int, HiddenStates]] = []

    def advance(
        self,
        layer_idx: int,
        tensors: Mapping[str, torch.Tensor],
        fused: Mapping[tuple[str, int], tuple[HeadMaps, Groups]],
    ) -> None:
        """Take every variant through a source layer, and start one for each `(side, count)` of this layer."""
        started = []
        for (side, count), (maps, groups) in fused.items():
            changed = reconstructed(tensors, self.streamed, side, maps, groups)
            with self.streamed.layer(layer_idx, changed) as run:
                started.append((layer_idx, side, count, run(self.source, None)))
        with self.streamed.layer(layer_idx, tensors) as run:
            self.source = run(self.source, None)
            self.variants = [(i, side, count, run(states, None)) for i, side, count, states in self.variants]
        self.variants += started

    def results(self) -> list[Probe]:
        """The divergence of every variant, after the last layer."""
        wanted = self._logits(self.source)
        probes = []
        for layer_idx, side, count, states in self.variants:
            lost = kl_divergence(self._logits(states), wanted).item() / len(wanted)
            probes.append(Probe(layer_idx, side, count, lost))
        return probes

    @torch.no_grad()
    def _logits(self, states: HiddenStates) -> torch.Tensor:
        hidden = self.streamed.last_hidden_state(states.hidden[:, ::READ_TOKENS]).flatten(0, 1)
        return self.streamed.logits(hidden).double()  # the divergence of equal models is 0, not the rounding of float32


def reconstructed(
    tensors: Mapping[str, torch.Tensor], streamed: StreamedModel, side: str, maps: HeadMaps, groups: Groups
) -> dict[str, torch.Tensor]:
    """A source layer's tensors with `key` or `value` heads replaced by what the fused heads give back of them.

    It has the source's shapes, so the source's own class computes the fused layer: read maps of keys commute with RoPE.
    """
    arch, d = streamed.arch, maps.read.shape[1]
    heads = streamed.heads
    weights = AttentionWeights.of_layer(tensors, arch, heads)
    product = torch.zeros(len(maps.read), len(maps.read), d, d, dtype=torch.float64)  # R_j P_i
    for group in groups:
        index = list(group)
        for j in index:
            product[j, index] = maps.read[j] @ maps.write[index] if len(group) > 1 else torch.eye(d).double()

    def back(weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("jiab,ibD->jaD", product, weight.double()).float()

    if side == "key":
        weights.key = back(weights.key)
        weights.key_bias = None if weights.key_bias is None else back(weights.key_bias[..., None])[..., 0]
    else:
        weights.value = back(weights.value)
        weights.value_bias = None if weights.value_bias is None else back(weights.value_bias[..., None])[..., 0]
    return weights.in_layer(tensors, arch, heads)
