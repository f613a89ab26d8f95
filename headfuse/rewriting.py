"""Calibration text rewritten by the source: what the refinement reads where it would read the same text again.

A second pass over the same windows learns what they alone have. A window in which the source drew some of the tokens
itself, each from what it expects after the window's own tokens, is other text of the same kind, for one more forward
pass (docs/experiments.md, "What the second pass reads").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from headfuse.streaming import StreamedModel

REWRITTEN = 0.3
"""Share of the tokens that are drawn anew; some of the draws are the token that stood there."""


@dataclass(frozen=True)
class Targets:
    """Token windows `[n, T]` and the source's last hidden states on them `[n, T, D]`, which its head reads."""

    windows: torch.Tensor
    hidden: torch.Tensor


@torch.no_grad()
def targets(
    streamed: StreamedModel, windows: torch.Tensor, on_layer: Callable[[int, int], None] = lambda done, total: None
) -> Targets:
    """Run the source over token windows `[n, T]`; `on_layer` is called with the layers done and all layers."""
    states = streamed.embed(windows)
    for layer_idx in range(streamed.num_layers):
        with streamed.layer(layer_idx, streamed.layer_tensors(layer_idx)) as run:
            states = run(states, None)
        on_layer(layer_idx + 1, streamed.num_layers)
    return Targets(windows, streamed.last_hidden_state(states.hidden))


@torch.no_grad()
def rewritten(streamed: StreamedModel, text: Targets, seed: int) -> torch.Tensor:
    """The windows `[n, T]` of a text with a share of their tokens drawn by the source.

    Args:
        streamed: the source.
        text: what the draws depend on; the first token of a window always stays, as nothing predicts it.
        seed: of which tokens, and of the draws.
    """
    generator, windows = torch.Generator().manual_seed(seed), text.windows.clone()
    for window, hidden in zip(windows, text.hidden, strict=True):
        places = 1 + (torch.rand(len(window) - 1, generator=generator) < REWRITTEN).nonzero()[:, 0]
        below = streamed.logits(hidden[places - 1]).float().softmax(dim=-1).cpu().cumsum(dim=-1)
        drawn = torch.rand(len(places), 1, generator=generator) * below[:, -1:]
        window[places] = torch.searchsorted(below, drawn, right=True)[:, 0].clamp_max(below.shape[1] - 1)
    return windows
