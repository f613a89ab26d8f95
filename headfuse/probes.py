"""Probes: what keeping fewer key heads or value heads of a layer costs, in nats of KL(source || fused).

`ErrorProbes` measure the error of the attention output at each count, and weigh keys against values by the end loss of
two whole models. `EndLossProbes` measure the end loss itself, of a variant for each count. Both fuse as the conversion
does: every fused layer's output projection is refitted, which makes good more of the keys' errors than of the values'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from headfuse.architectures import AttentionWeights
from headfuse.distillation import kl_divergence
from headfuse.fuse_layer import FusedHeads, reconstructed_outputs, refit_output
from headfuse.fusion.maps import HeadMaps
from headfuse.plan import Groups, HeadBudget
from headfuse.streaming import AttentionCapture, HiddenStates, StreamedModel

PROBE_COST = 2.0
"""Price of all probes of the end loss together, in forward passes over the calibration text; it decides how many tokens
they see."""
ERRORS_WORTH = 1000.0
"""Tokens on which the end loss tells as much of a count as the error of the attention output does: the error is biased,
the end loss of few tokens is noise (docs/experiments.md)."""
WEIGHED = 1 / 16
"""Tokens that weigh keys against values, over those of the calibration text."""
PROBE_LENGTH = 128
"""Tokens of a probe's window: different texts tell more than a long one."""
ROWS_PER_UNKNOWN = 4
"""Rows of text behind a refit that only tells what a count costs, for each number in a row of the projection."""
TINY = 1e-30

Costs = dict[tuple[int, str], dict[int, float]]
"""Of a layer's side: cost of each measured count."""
Fused = Mapping[tuple[str, int], tuple[HeadMaps, Groups]]
"""Maps and groups of each `(side, count)` with fewer heads than the source."""


@dataclass(frozen=True)
class Probe:
    """KL(source || model of equal counts with one side of one layer fused to `count` heads instead), in nats."""

    layer_idx: int
    side: str
    count: int
    divergence: float


def probe_tokens(tokens: float, layers: int, counts: int) -> int:
    """How many tokens each of `2 layers counts` probes may see; a probe costs half a forward pass on average."""
    return max(64, int(PROBE_COST * tokens / max(1, layers * counts)))


def weighing_tokens(tokens: int) -> int:
    """How many tokens the two models see whose end loss weighs keys against values."""
    return max(64, int(WEIGHED * tokens))


def probe_windows(windows: torch.Tensor, tokens: int) -> torch.Tensor:
    """The beginnings of as many windows `[k, T]` as `tokens` reach for, longer ones where there are too few."""
    used = min(len(windows), max(1, round(tokens / PROBE_LENGTH)))
    return windows[:used, : tokens // used]


class ErrorProbes:
    """Errors of the attention output, made comparable across the sides by the end loss.

    The closed form tells apart the layers of one side, but an error of values costs more than one of keys that is as
    large (docs/experiments.md). So the errors of a side are scaled to add up to the divergence of a model in which that
    side alone is fused, to equal counts.

    Args:
        streamed: the source.
        windows: the tokens that the two models see, `[k, T]`.
        equal: their counts; lowered to the next that is measured.
        refit: whether the conversion refits output projections.
    """

    worth = ERRORS_WORTH

    def __init__(self, streamed: StreamedModel, windows: torch.Tensor, equal: HeadBudget, refit: bool) -> None:
        self.streamed, self.refit, self.errors = streamed, refit, Costs()
        self.equal = {"key": equal.key_heads, "value": equal.value_heads}
        self.source = streamed.embed(windows)
        self.fused = dict.fromkeys(self.equal, self.source)
        self.summed = dict.fromkeys(self.equal, 0.0)

    def advance(
        self,
        layer_idx: int,
        tensors: Mapping[str, torch.Tensor],
        fused: Fused,
        captures: Sequence[AttentionCapture],
        hidden: torch.Tensor,
    ) -> None:
        """Measure the counts of a layer, and take the two models through it.

        Args:
            layer_idx: of the layer.
            tensors: the source's.
            fused: maps and groups of each `(side, count)` with fewer heads than the source.
            captures: the source's layer on calibration text.
            hidden: the residual stream before the layer, of the windows of weight 1, `[k, T, D]`.
        """
        output = AttentionWeights.of_layer(tensors, self.streamed.arch, self.streamed.heads).output
        ordinary = [capture for capture in captures if capture.weight == 1]
        seen = ordinary[: max(1, len(ordinary) // 4)]
        others = ordinary[len(seen) :] + [c for c in captures if c.weight != 1] if len(ordinary) > 1 else captures
        fitted = some_of(others, output)
        targets = [capture.output.flatten(2) @ output.to(capture.output).flatten(1).T for capture in seen]
        for side, counts in self.equal.items():
            measured = sorted(count for s, count in fused if s == side)
            equal = max([count for count in measured if count <= counts[layer_idx]] or measured[:1], default=None)
            layer = tensors
            row = self.errors.setdefault((layer_idx, side), {})
            for count in measured:
                changed = {side: fused[side, count]}
                refitted = refit_output(output, fitted, changed) if self.refit else output
                row[count] = output_error(seen, targets, hidden, refitted, changed)
                if count == equal:
                    self.summed[side] += row[count]
                    layer = with_heads(tensors, self.streamed, changed, refitted)
            with self.streamed.layer(layer_idx, layer) as run:
                self.fused[side] = run(self.fused[side], None)
        with self.streamed.layer(layer_idx, tensors) as run:
            self.source = run(self.source, None)

    def costs(self) -> Costs:
        """The scaled errors of each layer's sides, 0 for all heads; unscaled where nothing was lost."""
        n, scales = self.streamed.heads.num_key_value_heads, dict.fromkeys(self.fused, 1.0)
        found = divergences(self.streamed, self.source, list(self.fused.values()))
        for side, divergence in zip(self.fused, found, strict=True):
            if divergence > 0 and self.summed[side] > 0:
                scales[side] = divergence / self.summed[side]
        return {
            (i, side): {**{count: scales[side] * error for count, error in row.items()}, n: 0.0}
            for (i, side), row in self.errors.items()
        }


def some_of(captures: Sequence[AttentionCapture], output: torch.Tensor) -> Sequence[AttentionCapture]:
    """The short windows, and of the others as many as a refit of `output [D, n_q, d]` for a cost needs."""
    rows, enough = 0, list[AttentionCapture]()
    for capture in captures:
        if capture.weight != 1 or rows < ROWS_PER_UNKNOWN * output[0].numel():
            enough.append(capture)
            rows += capture.output.shape[:2].numel() if capture.weight == 1 else 0
    return enough


def output_error(
    captures: Sequence[AttentionCapture],
    targets: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    output: torch.Tensor,
    fused: FusedHeads,
) -> float:
    """Mean of |e|^2 / (|e|^2 + |x|^2) over tokens: e the error of the attention output, x the residual stream.

    Token by token, because a few tokens with massive activations hold nearly all of the energy.

    Args:
        captures: the source's layer on the text to measure on, of all or the first of `hidden`.
        targets: the source's attention output of each of them, `[B, T, D]`.
        hidden: the residual stream before the layer, `[k, T, D]`.
        output: output projection that reads the fused heads, `[D, n_q, d]`.
        fused: maps and groups of the sides that are fused.
    """
    share, tokens, first = 0.0, 0, 0
    for capture, target in zip(captures, targets, strict=True):
        z = reconstructed_outputs(capture, fused).transpose(1, 2)  # [B, T, n_q, d]
        error = z.flatten(2) @ output.to(z).flatten(1).T - target
        squared, energy = error.square().sum(-1), hidden[first : first + len(z)].square().sum(-1)
        share += (squared / (squared + energy).clamp_min(TINY)).sum().item()
        tokens, first = tokens + energy.numel(), first + len(z)
    return share / tokens


class EndLossProbes:
    """Hidden states of fused variants on their way through the layers (mathematics.md section 8.4).

    Costs add up near the point where they were measured, and errors of fused layers compound. So one side of one layer
    is fused more or less not in the source but in a model that is fused to the same budget with equal counts. All
    variants advance together, so every layer is loaded once.

    Args:
        streamed: the source.
        windows: the tokens that the probes see, `[k, T]`.
        equal: the counts of the model that the variants differ from; those that are not given to `advance` are lowered
            to the next one that is.
    """

    def __init__(self, streamed: StreamedModel, windows: torch.Tensor, equal: HeadBudget) -> None:
        self.streamed, self.worth = streamed, float(windows.numel())
        self.equal = {"key": list(equal.key_heads), "value": list(equal.value_heads)}
        self.source = self.fused = streamed.embed(windows)
        self.variants: list[tuple[int, str, int, HiddenStates]] = []

    def advance(
        self,
        layer_idx: int,
        tensors: Mapping[str, torch.Tensor],
        fused: Fused,
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
        output = AttentionWeights.of_layer(tensors, self.streamed.arch, self.streamed.heads).output
        fitted = some_of(captures, output)

        def variant(**changed: int) -> Mapping[str, torch.Tensor]:
            chosen = {side: fused[side, c] for side, c in {**equal, **changed}.items() if c < n}
            if not chosen:
                return tensors
            refitted = refit_output(output, fitted, chosen) if fitted else None
            return with_heads(tensors, self.streamed, chosen, refitted)

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
        states = [self.fused, *(states for *_, states in self.variants)]
        equal, *others = divergences(self.streamed, self.source, states)
        probes = [Probe(i, side, count, d) for (i, side, count, _), d in zip(self.variants, others, strict=True)]
        rows = dict.fromkeys((probe.layer_idx, probe.side) for probe in probes)
        return probes + [Probe(i, side, self.equal[side][i], equal) for i, side in rows]

    def costs(self) -> Costs:
        """The costs that the results say."""
        return costs(self.results())


@torch.no_grad()
def divergences(streamed: StreamedModel, source: HiddenStates, variants: Sequence[HiddenStates]) -> list[float]:
    """KL(source || variant) of each variant, in nats per position, given what the last layers made of the windows."""

    def logits(states: HiddenStates, window: int) -> torch.Tensor:  # float64: that of equal models is 0, not rounding
        return streamed.logits(streamed.last_hidden_state(states.hidden[window : window + 1])).flatten(0, 1).double()

    sums = [0.0] * len(variants)
    for window in range(len(source)):
        wanted = logits(source, window)
        for index, states in enumerate(variants):
            sums[index] += kl_divergence(logits(states, window), wanted).item()
    return [total / source.hidden.shape[:2].numel() for total in sums]


def costs(probes: Iterable[Probe]) -> Costs:
    """What each count of a layer's side costs, in nats: its divergence less that of all heads, at least 0."""
    rows = Costs()
    for probe in probes:
        rows.setdefault((probe.layer_idx, probe.side), {})[probe.count] = probe.divergence
    return {place: {count: max(0.0, d - row[max(row)]) for count, d in row.items()} for place, row in rows.items()}


def with_heads(
    tensors: Mapping[str, torch.Tensor],
    streamed: StreamedModel,
    fused: FusedHeads,
    output: torch.Tensor | None = None,
) -> Mapping[str, torch.Tensor]:
    """A source layer's tensors with keys, values or both replaced by what their fused heads give back of them.

    `output [D, n_q, d]` takes the place of the output projection, where it is given.
    """
    for side, maps in fused.items():
        tensors = reconstructed(tensors, streamed, side, *maps)
    if output is None:
        return tensors
    weights = AttentionWeights.of_layer(tensors, streamed.arch, streamed.heads)
    weights.output = output
    return weights.in_layer(tensors, streamed.arch, streamed.heads)


def reconstructed(
    tensors: Mapping[str, torch.Tensor], streamed: StreamedModel, side: str, maps: HeadMaps, groups: Groups
) -> dict[str, torch.Tensor]:
    """A source layer's tensors with `key` or `value` heads replaced by what the fused heads give back of them.

    It has the source's shapes, so the source's own class computes the fused layer: read maps of keys commute with RoPE.
    """
    arch, heads = streamed.arch, streamed.heads
    weights = AttentionWeights.of_layer(tensors, arch, heads)

    def back(weight: torch.Tensor) -> torch.Tensor:
        return maps.reconstruct(weight.double().mT, groups).mT.float()

    if side == "key":
        weights.key = back(weights.key)
        weights.key_bias = None if weights.key_bias is None else back(weights.key_bias[..., None])[..., 0]
    else:
        weights.value = back(weights.value)
        weights.value_bias = None if weights.value_bias is None else back(weights.value_bias[..., None])[..., 0]
    return weights.in_layer(tensors, arch, heads)
