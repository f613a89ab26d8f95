"""Costs of head counts by the error of the attention output."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headfuse.choices import Side
from headfuse.fusion.refit import FusedHeads, reconstructed_outputs, refit_output
from headfuse.models.capture import AttentionCapture
from headfuse.models.source_layer import SourceLayer
from headfuse.models.streamed import StreamedModel
from headfuse.plan import HeadBudget
from headfuse.planning.end_loss_probes import OnWindow, divergences, quiet
from headfuse.planning.fused_variants import Costs, Fused, Variant, captures_for_refit, with_heads

ERRORS_WORTH = 1000.0
"""Weight of the output error, in tokens: it is biased but precise, and counts like an end loss measured on this many
tokens (docs/experiments.md).
"""
WIDE_ERRORS_WORTH = 100.0
"""Weight of the output error for widths of wide heads: a higher weight would give the first layer far too much.
"""
TINY = 1e-30


class ErrorProbes:
    """Errors of the attention output, scaled by the end loss so that keys and values can be compared.

    The error ranks the layers of one side, but an error of values costs more than an equally large error of keys
    (docs/experiments.md). So the errors of a side are scaled to add up to the divergence of a model in which that side
    alone is fused, to equal counts.

    Args:
        streamed: the source.
        windows: the tokens that the two models see, `[k, T]`.
        equal: their counts; lowered to the next that is measured.
        refit: whether the conversion refits output projections.
        full: the count that keeps all of a side; by default the source's heads.
    """

    worth: float = ERRORS_WORTH
    every_refit: bool = True
    """Refit the output for every count; False: for the equal count alone, and scale the errors of the others by what
    it leaves of that one's. It takes a fifth of the time and serves wide heads as well
    (docs/experiments/wide-heads.md).
    """
    every_count = False

    def __init__(
        self,
        streamed: StreamedModel,
        windows: torch.Tensor,
        equal: HeadBudget,
        refit: bool,
        full: int | None = None,
    ) -> None:
        self.streamed, self.refit, self.errors = streamed, refit, Costs()
        self.full = full or streamed.heads.num_key_value_heads
        self.equal: dict[Side, tuple[int, ...]] = {"key": equal.key_heads, "value": equal.value_heads}
        self.source = streamed.embed(windows)
        self.fused = dict.fromkeys(self.equal, self.source)
        self.summed = dict.fromkeys(self.equal, 0.0)

    def advance(self, source: SourceLayer, fused: Fused) -> None:
        """Measure the counts of a layer, and take the two models through it.

        Args:
            source: the source's layer on calibration text; its first inputs are those of the windows of weight 1.
            fused: maps and groups of each `(side, count)` with fewer heads than the source.
        """
        layer_idx, tensors, captures = source.index, source.tensors, source.captures
        output, hidden = source.weights.output, source.inputs[0].hidden
        ordinary = [capture for capture in captures if capture.weight == 1]
        ordinary = ordinary[0].windows() if len(ordinary) == 1 else ordinary
        seen = ordinary[: max(1, len(ordinary) // 4)]
        others = ordinary[len(seen) :] + [c for c in captures if c.weight != 1] if len(ordinary) > 1 else captures
        fitted = captures_for_refit(others, output)
        read = output.to(hidden).flatten(1).T
        targets = [capture.output.flatten(2) @ read for capture in seen]
        for side, counts in self.equal.items():
            measured = sorted(count for s, count in fused if s == side)
            equal = max([count for count in measured if count <= counts[layer_idx]] or measured[:1], default=None)
            layer, projection, row = Variant(tensors), output, dict[int, float]()
            for count in measured:
                changed, refitted = {side: fused[side, count]}, output
                if self.refit and (self.every_refit or count == equal):
                    refitted = refit_output(output, fitted, changed)
                    projection = refitted if count == equal else projection
                row[count] = output_error(seen, targets, hidden, refitted if self.every_refit else output, changed)
            if equal is not None:
                changed = {side: fused[side, equal]}
                if self.refit and not self.every_refit and row[equal] > 0:
                    left = output_error(seen, targets, hidden, projection, changed) / row[equal]
                    row = {count: left * error for count, error in row.items()}
                self.summed[side] += row[equal]
                layer = with_heads(tensors, self.streamed, changed, projection)
            self.errors.setdefault((layer_idx, side), {}).update(row)
            with self.streamed.layer(layer_idx, layer.tensors, layer.keys) as run:
                self.fused[side] = run(self.fused[side])
        with self.streamed.layer(layer_idx, tensors) as run:
            self.source = run(self.source)

    def costs(self, on_window: OnWindow = quiet) -> Costs:
        """The scaled errors of each layer's sides, 0 for all heads; unscaled where nothing was lost."""
        scales = dict.fromkeys(self.fused, 1.0)
        found = divergences(self.streamed, self.source, list(self.fused.values()), on_window)
        for side, divergence in zip(self.fused, found, strict=True):
            if divergence > 0 and self.summed[side] > 0:
                scales[side] = divergence / self.summed[side]
        return {
            (i, side): {**{count: scales[side] * error for count, error in row.items()}, self.full: 0.0}
            for (i, side), row in self.errors.items()
        }


def output_error(
    captures: Sequence[AttentionCapture],
    targets: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    output: torch.Tensor,
    fused: FusedHeads,
) -> float:
    """Mean of |e|^2 / (|e|^2 + |x|^2) over tokens: e the error of the attention output, x the residual stream.

    Behind a norm of the attention output e is multiplied by the norm's gain. Token by token, because a few tokens with
    massive activations hold nearly all of the energy.

    Args:
        captures: the source's layer on the text to measure on, of all or the first of `hidden`.
        targets: the source's attention output of each of them, `[B, T, D]`.
        hidden: the residual stream before the layer, `[k, T, D]`.
        output: output projection that reads the fused heads, `[D, n_q, d]`.
        fused: maps and groups of the sides that are fused.
    """
    shares, tokens, first, read = list[torch.Tensor](), 0, 0, output.to(hidden).flatten(1).T
    for capture, target in zip(captures, targets, strict=True):
        z = reconstructed_outputs(capture, fused).transpose(1, 2)  # [B, T, n_q, d]
        error = z.flatten(2) @ read - target
        error = error if capture.gain is None else error * capture.gain[..., None]
        squared, energy = error.square().sum(-1), hidden[first : first + len(z)].square().sum(-1)
        shares.append((squared / (squared + energy).clamp_min(TINY)).sum())
        tokens, first = tokens + energy.numel(), first + len(z)
    return sum(torch.stack(shares).tolist()) / tokens
