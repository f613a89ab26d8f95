"""Costs of head counts by the divergence of the model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from headfuse.choices import Side
from headfuse.fusion.refit import FusedHeads, refit_output
from headfuse.models.decoder_layers import HiddenStates
from headfuse.models.logits import divergence_from, log_probabilities
from headfuse.models.placement import widened
from headfuse.models.source_layer import LoadedLayer, SourceLayer
from headfuse.models.streamed import StreamedModel
from headfuse.plan import HeadBudget
from headfuse.planning.fused_variants import Costs, Fused, captures_for_refit, with_heads

OnWindow = Callable[[int, int], None]
"""Called with the windows done and all windows: each takes the logits of all variants, minutes with a large vocabulary.
"""


def quiet(done: int, total: int) -> None:
    """Say nothing of a window that is done."""


@dataclass(frozen=True)
class Probe:
    """KL(source || model of equal counts with one side of one layer fused to `count` heads instead), in nats."""

    layer_idx: int
    side: Side
    count: int
    divergence: float


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
        refit: whether the conversion refits output projections.
        full: the count that keeps all of a side; by default the source's heads.
    """

    every_count = True

    def __init__(
        self,
        streamed: StreamedModel,
        windows: torch.Tensor,
        equal: HeadBudget,
        refit: bool,
        full: int | None = None,
    ) -> None:
        self.streamed, self.refit, self.worth = streamed, refit, float(windows.numel())
        self.full = full or streamed.heads.num_key_value_heads
        self.equal: dict[Side, list[int]] = {"key": list(equal.key_heads), "value": list(equal.value_heads)}
        self.source = self.fused = streamed.embed(windows)  # the model of equal counts, then every variant in turn
        self.variants: list[tuple[int, Side, int]] = []

    def advance(self, source: SourceLayer, fused: Fused) -> None:
        """Take every variant through a layer, and start one for each `(side, count)` of this layer.

        Args:
            source: the source's layer, on calibration text where output projections are refitted.
            fused: maps and groups of each `(side, count)` with fewer heads than the source.
        """
        layer_idx, tensors, output = source.index, source.tensors, source.weights.output
        n = self.full
        counts = {side: sorted({n} | {count for s, count in fused if s == side}) for side in self.equal}
        for side, row in self.equal.items():
            row[layer_idx] = max(count for count in counts[side] if count <= row[layer_idx] or count == counts[side][0])

        equal = {side: row[layer_idx] for side, row in self.equal.items()}
        fitted = captures_for_refit(source.captures, output) if self.refit else ()

        def variant(counts: Mapping[Side, int]) -> AbstractContextManager[LoadedLayer]:
            chosen: FusedHeads = {side: fused[side, c] for side, c in counts.items() if c < n}
            if not chosen:
                return self.streamed.layer(layer_idx, tensors)
            refitted = refit_output(output, fitted, chosen) if self.refit else None
            changed = with_heads(tensors, self.streamed, chosen, refitted)
            return self.streamed.layer(layer_idx, changed.tensors, changed.keys)

        started, before = list[torch.Tensor](), next(self.fused.split(len(self.source)))
        for side in self.equal:
            for count in counts[side]:
                if count != equal[side]:
                    self.variants.append((layer_idx, side, count))
                    with variant({**equal, side: count}) as run:
                        started.append(run(before).hidden)
        with self.streamed.layer(layer_idx, tensors) as run:
            self.source = run(self.source)
        with variant(equal) as run:
            self.fused = run(self.fused)
        self.fused = replace(self.fused, hidden=torch.cat([self.fused.hidden, *started]))

    def results(self, on_window: OnWindow = quiet) -> list[Probe]:
        """Every count of every side, after the last layer; the divergence of equal counts stands in each row."""
        states = list(self.fused.split(len(self.source)))
        equal, *others = divergences(self.streamed, self.source, states, on_window)
        probes = [Probe(*variant, d) for variant, d in zip(self.variants, others, strict=True)]
        rows = dict.fromkeys((probe.layer_idx, probe.side) for probe in probes)
        return probes + [Probe(i, side, self.equal[side][i], equal) for i, side in rows]

    def costs(self, on_window: OnWindow = quiet) -> Costs:
        """The costs computed from the results."""
        return costs(self.results(on_window))


def divergences(
    streamed: StreamedModel, source: HiddenStates, variants: Sequence[HiddenStates], on_window: OnWindow = quiet
) -> list[float]:
    """KL(source || variant) of each variant, in nats per position, given what the last layers made of the windows."""
    rows = window_divergences(streamed, source, variants, exact=True, on_window=on_window).tolist()
    return [sum(row) / source.hidden.shape[:2].numel() for row in rows]


@torch.no_grad()
def window_divergences(
    streamed: StreamedModel,
    source: HiddenStates,
    variants: Sequence[HiddenStates],
    exact: bool = False,
    on_window: OnWindow = quiet,
) -> torch.Tensor:
    """The same of each window, in nats, summed over its positions, `[variants, windows]`.

    `exact`: in float64, where that of equal models is 0 and not rounding.
    """

    def logits(states: HiddenStates, window: int) -> torch.Tensor:
        found = streamed.logits(streamed.last_hidden_state(states.hidden[window : window + 1])).flatten(0, 1)
        return widened(found) if exact else found

    found = list[torch.Tensor]()
    for window in range(len(source)):
        wanted = log_probabilities(logits(source, window))
        found += [divergence_from(wanted, logits(states, window)) for states in variants]
        on_window(window + 1, len(source))
    return torch.stack(found or [torch.empty(0)]).view(len(source), len(variants)).T


def costs(probes: Iterable[Probe]) -> Costs:
    """What each count of a layer's side costs, in nats: its divergence less that of all heads, at least 0."""
    rows = Costs()
    for probe in probes:
        rows.setdefault((probe.layer_idx, probe.side), {})[probe.count] = probe.divergence
    return {place: {count: max(0.0, d - row[max(row)]) for count, d in row.items()} for place, row in rows.items()}
