"""One decoder layer of the source: its weights, and its outputs for the windows that went through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headfuse.checkpoint.reader import all_finite
from headfuse.errors import CheckpointError
from headfuse.models.attention import AttentionWeights
from headfuse.models.capture import AttentionCapture, HostCapture
from headfuse.models.decoder_layers import DecoderLayers, HiddenStates
from headfuse.models.placement import has_room

Captures = tuple[AttentionCapture, ...]
CAPTURED = 4
"""Tensors of a capture, each at most about as large as the hidden states."""


@dataclass(frozen=True)
class SourceLayer:
    """A layer on a walk over the source (`StreamedModel.walk`); its fields are gone when the walk goes on.

    This keeps one layer in memory at a time, even if the caller still refers to the layer before.
    """

    index: int
    tensors: Mapping[str, torch.Tensor]
    """As stored, in their own dtype; names relative to the layer."""
    weights: AttentionWeights
    captures: Captures
    """Of the windows that statistics are taken on, a batch each."""
    inputs: tuple[HiddenStates, ...]
    outputs: tuple[HiddenStates, ...]

    def release(self) -> None:
        """Drop all tensors."""
        vars(self).clear()


@dataclass(frozen=True)
class LoadedLayer:
    """A layer of the source on the device, as a function of hidden states."""

    layers: DecoderLayers
    index: int
    module: nn.Module
    folder: Path
    """Of the checkpoint, for errors."""

    def __call__(self, states: HiddenStates) -> HiddenStates:
        """The layer's output for these states.

        Raises:
            CheckpointError: when that is NaN or infinity.
        """
        outputs = self.layers.through(self.module, self.index, states)
        self._check([outputs.hidden])
        return outputs

    def capture(self, states: HiddenStates) -> tuple[HiddenStates, Captures]:
        """The layer's output for these states, and captures of its attention, one batch each.

        Raises:
            CheckpointError: when one of them is NaN or infinity: attention may hide what its scores are not.
        """
        attention: Any = self.module.get_submodule(self.layers.arch.attention)
        captures = list[AttentionCapture]()
        room = has_room(self.layers.device, CAPTURED * states.hidden.nbytes)
        attention.headfuse_captures = captures, states.weight, (lambda capture: capture) if room else HostCapture
        try:
            with _gains(self.module, attention) as gains:
                outputs = self.layers.through(self.module, self.index, states)
        finally:
            attention.headfuse_captures = None
        for capture, gain in zip(captures, gains, strict=True):
            vars(capture)["gain"] = gain
        self._check([outputs.hidden, *(x for c in captures for x in (c.query, c.key, c.value))])
        return outputs, tuple(captures)

    def _check(self, computed: Sequence[torch.Tensor]) -> None:
        if not all_finite(computed):
            raise CheckpointError(
                f"layer {self.index} computes NaN or infinity",
                where=self.folder,
                fix="weights or config.json are damaged: take a checkpoint that generates text",
            )


@contextlib.contextmanager
def _gains(layer: nn.Module, attention: nn.Module) -> Iterator[list[torch.Tensor | None]]:
    """Of each call of the attention, the `gain` of a capture: None where no other module reads its output as it is."""
    found, reached = list[torch.Tensor | None](), list[torch.Tensor]()

    def attended(_: nn.Module, __: Any, output: Any) -> None:
        reached[:] = [output[0] if isinstance(output, tuple) else output]
        found.append(None)

    def read(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if reached and inputs and inputs[0] is reached[0]:
            size = reached[0].float().norm(dim=-1)
            found[-1] = output.float().norm(dim=-1) / size.clamp_min(torch.finfo(torch.float32).tiny)

    hooks = [attention.register_forward_hook(attended)]
    hooks += [child.register_forward_hook(read) for child in layer.children() if child is not attention]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
