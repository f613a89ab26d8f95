"""The attention of all layers refined together, towards the source's output distribution, one layer in memory.

A smaller local error is not a smaller loss: errors compound, and most of a layer's error does not reach the end. This
stage sees the end alone: KL(source || fused) over the full vocabulary on the calibration text (mathematics.md section
6.2). A step runs forward through the layers and keeps only their inputs, then backward, where each layer is computed
again; weights and moments of the optimizer lie in mapped files, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from headfuse.checkpoint import mapped_tensor, sync
from headfuse.distillation import kl_divergence
from headfuse.guard import WrittenLayers
from headfuse.streaming import HiddenStates, StreamedModel, release_freed_blocks

LEARNING_RATE, FINAL_LEARNING_RATE, WARMUP_STEPS = 1e-3, 0.05, 5
FULL_RATE_WIDTH = 256
"""Wider models learn at a rate that falls as 1 / hidden_size."""
BETAS, EPSILON = (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Targets:
    """Token windows `[n, T]` and the source's last hidden states on them `[n, T, D]`, which its head reads."""

    windows: torch.Tensor
    hidden: torch.Tensor


class Adam:
    """Weights in float32 with their moments, in mapped files (Kingma and Ba, 1412.6980, algorithm 1).

    Args:
        folder: where the files are; those of an earlier process are used as they are.
        shapes: of the weights, by name.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        def mapped(part: str) -> dict[str, torch.Tensor]:
            return {name: mapped_tensor(folder / f"{name}.{part}", shape) for name, shape in shapes.items()}

        self.folder = folder
        self.weights, self.means, self.squares = mapped("weight"), mapped("mean"), mapped("square")

    def sync(self) -> None:
        """Bring the weights to the disk."""
        for name in self.weights:
            sync(self.folder / f"{name}.weight")

    def step(self, name: str, gradient: torch.Tensor, rate: float, step: int) -> None:
        """Update one weight; `step` counts from 1."""
        gradient, mean, square = gradient.to("cpu", torch.float32), self.means[name], self.squares[name]
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        root = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
        self.weights[name].addcdiv_(mean, root, value=-rate / (1 - BETAS[0] ** step))


def refine_model(
    streamed: StreamedModel,
    layers: WrittenLayers,
    optimizer: Adam,
    text: Targets,
    passes: float,
    seed: int,
    on_step: Callable[[int, int], None],
) -> None:
    """Train the attention of a written model; everything else stays as it is.

    Args:
        streamed: the source, for what lies outside the layers.
        layers: the fused model's layers.
        optimizer: their attention weights, trained in place.
        text: the calibration text.
        passes: how often each window is used.
        seed: of the order of the windows.
        on_step: called with the steps done and all steps.
    """
    steps, rate = round(len(text.windows) * passes), learning_rate(text.hidden.shape[-1])
    for step, index in zip(range(1, steps + 1), _shuffled(len(text.windows), seed), strict=False):
        states, inputs = streamed.embed(text.windows[index : index + 1]), list[HiddenStates]()
        for layer_idx in range(streamed.num_layers):
            inputs.append(states)
            states = layers.run(layer_idx, states, optimizer.weights)

        def divergence(logits: torch.Tensor, part: slice, target: torch.Tensor = text.hidden[index]) -> torch.Tensor:
            with torch.no_grad():
                wanted = streamed.logits(target[part])
            return kl_divergence(logits, wanted) / len(target)

        release_freed_blocks()  # of the layers, then of the logits
        gradient, now = streamed.end_gradient(states, divergence), rate * _schedule(step, steps)
        release_freed_blocks()
        for layer_idx in reversed(range(streamed.num_layers)):
            gradient, of_weights = layers.backward(layer_idx, inputs.pop(), gradient, optimizer.weights)
            for name, value in of_weights.items():
                optimizer.step(name, value, now, step)
        on_step(step, steps)


def learning_rate(hidden_size: int) -> float:
    """The highest learning rate; Adam's steps on a matrix do more, the wider it is (muP, 2203.03466)."""
    return LEARNING_RATE * min(1.0, FULL_RATE_WIDTH / hidden_size)


def _schedule(step: int, steps: int) -> float:
    """The learning rate of a step relative to the peak: a short warm-up, then linear to its final value."""
    return min(1.0, step / WARMUP_STEPS) * (1 - (1 - FINAL_LEARNING_RATE) * (step - 1) / steps)


def _shuffled(windows: int, seed: int) -> Iterator[int]:
    """Window indices, every pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(windows, generator=generator).tolist()
