"""Probes of the end loss, KL(source || fused), for the cost table of the budget.

Costs add up near the point where they were measured, and errors of fused layers compound. So one side of one layer is
fused more or less not in the source but in a model that is fused to the same budget with equal counts. Every layer's
output projection is refitted as in the conversion, which makes good more of the keys' errors than of the values'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from headfuse.architectures import AttentionWeights
from headfuse.distillation import kl_divergence
from headfuse.fuse_layer import least_squares_output
from headfuse.fusion.maps import HeadMaps
from headfuse.plan import Groups, HeadBudget, HeadLayout
from headfuse.streaming import AttentionCapture, HiddenStates, StreamedModel

PROBE_COST = 2.0
"""Price of all probes together, in forward passes over the calibration text; it decides how many tokens they see."""
ROWS_PER_UNKNOWN = 4
"""Rows of text behind a refit for each number in a row of the output projection."""
READ_TOKENS = 4
"""One in so many tokens enters the divergence: reading logits costs more than it tells."""


@dataclass(frozen=True)
class Probe:
    """KL(source || model of equal counts with one side of one layer fused to `count` heads instead), in nats."""

    layer_idx: int
    side: str
    count: int
    divergence: float


def probed_counts(heads: int, every_count: bool) -> int:
    """How many counts below all `heads` of a side are probed: those that are powers of two, or every one."""
    return heads - 1 if every_count else (heads - 1).bit_length()


def probe_tokens(tokens: float, layers: int, counts: int) -> int:
    """How many tokens each of `2 layers counts` probes may see; a probe costs half a forward pass on average."""
    return max(64, int(PROBE_COST * tokens / max(1, layers * counts)))


class EndLossProbes:
    """Hidden states of fused variants on their way through the layers (math.md 4).

    All variants advance together, so every layer is loaded once.

    Args:
        streamed: the source.
        windows: the tokens that the probes see, `[k, T]`.
        equal: the counts of the model that the variants differ from; those that are not given to `advance` are lowered
            to the next one that is.
    """

    def __init__(self, streamed: StreamedModel, windows: torch.Tensor, equal: HeadBudget) -> None:
        self.streamed, self.windows = streamed, windows
        self.equal = {"key": list(equal.key_heads), "value": list(equal.value_heads)}
        self.source = self.fused = streamed.embed(windows)
        self.variants: list[tuple[int, str, int, HiddenStates]] = []

    def advance(
        self,
        layer_idx: int,
        tensors: Mapping[str, torch.Tensor],
        fused: Mapping[tuple[str, int], tuple[HeadMaps, Groups]],
        captures: Sequence[AttentionCapture] = (),
    ) -> None:
        """Take every variant through a layer, and start one for each `(side, count)` of this layer.

        Args:
            layer_idx: of the layer.
            tensors: the source's.
            fused: maps and groups of each `(side, count)` with fewer heads than the source.
            captures: the source's layer on calibration text, to refit output projections; without, they stay as folded.
        """
        n = self.streamed.heads.num_key_value_heads
        counts = {side: sorted({n} | {count for s, count in fused if s == side}) for side in self.equal}
        for side, row in self.equal.items():
            row[layer_idx] = max(count for count in counts[side] if count <= row[layer_idx] or count == counts[side][0])

        equal = {side: row[layer_idx] for side, row in self.equal.items()}
        captures = _enough(captures, self.streamed.heads)

        def variant(**changed: int) -> Mapping[str, torch.Tensor]:
            chosen = {side: fused[side, c] for side, c in {**equal, **changed}.items() if c < n}
            return with_heads(tensors, self.streamed, chosen, captures) if chosen else tensors

        started = []
        for side in self.equal:
            for count in counts[side]:
                if count != equal[side]:
                    with self.streamed.layer(layer_idx, variant(**{side: count})) as run:
                        started.append((layer_idx, side, count, run(self.fused, None)))
        with self.streamed.layer(layer_idx, tensors) as run:
            self.source = run(self.source, None)
        with self.streamed.layer(layer_idx, variant()) as run:
            self.fused = run(self.fused, None)
            self.variants = [(i, side, count, run(states, None)) for i, side, count, states in self.variants]
        self.variants += started

    def results(self) -> list[Probe]:
        """Every count of every side, after the last layer; the divergence of equal counts stands in each row."""
        wanted = self._logits(self.source)

        def divergence(states: HiddenStates) -> float:
            return kl_divergence(self._logits(states), wanted).item() / len(wanted)

        equal = divergence(self.fused)
        probes = [Probe(i, side, count, divergence(states)) for i, side, count, states in self.variants]
        rows = dict.fromkeys((probe.layer_idx, probe.side) for probe in probes)
        return probes + [Probe(i, side, self.equal[side][i], equal) for i, side in rows]

    @torch.no_grad()
    def _logits(self, states: HiddenStates) -> torch.Tensor:
        hidden = self.streamed.last_hidden_state(states.hidden[:, ::READ_TOKENS]).flatten(0, 1)
        return self.streamed.logits(hidden).double()  # the divergence of equal models is 0, not the rounding of float32


def costs(probes: Iterable[Probe]) -> dict[tuple[int, str], dict[int, float]]:
    """What each count of a layer's side costs, in nats: its divergence less that of all heads, at least 0."""
    rows: dict[tuple[int, str], dict[int, float]] = {}
    for probe in probes:
        rows.setdefault((probe.layer_idx, probe.side), {})[probe.count] = probe.divergence
    return {place: {count: max(0.0, d - row[max(row)]) for count, d in row.items()} for place, row in rows.items()}


def _enough(captures: Sequence[AttentionCapture], heads: HeadLayout) -> list[AttentionCapture]:
    """As many of the long windows as a refit needs, and all short ones."""
    rows, chosen = 0, list[AttentionCapture]()
    for capture in captures:
        if capture.weight != 1 or rows < ROWS_PER_UNKNOWN * heads.num_attention_heads * heads.head_dim:
            chosen.append(capture)
            rows += capture.output.shape[:2].numel() if capture.weight == 1 else 0
    return chosen


def with_heads(
    tensors: Mapping[str, torch.Tensor],
    streamed: StreamedModel,
    fused: Mapping[str, tuple[HeadMaps, Groups]],
    captures: Sequence[AttentionCapture],
) -> Mapping[str, torch.Tensor]:
    """A source layer's tensors with keys, values or both replaced by what their fused heads give back of them.

    Where there are captures of the source's layer, its output projection is refitted to what is left.
    """
    arch, heads = streamed.arch, streamed.heads
    for side, maps in fused.items():
        tensors = reconstructed(tensors, streamed, side, *maps)
    if not captures:
        return tensors

    def left(side: str, source: torch.Tensor) -> torch.Tensor:
        return fused[side][0].reconstruct(source, fused[side][1]) if side in fused else source

    def head_outputs(capture: AttentionCapture) -> torch.Tensor:
        value = left("value", capture.value).repeat_interleave(heads.queries_per_head, dim=1)
        return capture.probabilities(left("key", capture.key)) @ value

    weights = AttentionWeights.of_layer(tensors, arch, heads)
    weights.output = least_squares_output(weights.output, weights.output, captures, head_outputs).float()
    return weights.in_layer(tensors, arch, heads)


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
