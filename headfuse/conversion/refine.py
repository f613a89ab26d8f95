"""Refinement: the attention of all layers is trained towards the source's output distribution, one layer in memory."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from headfuse.checkpoint.disk import sync, write_whole
from headfuse.checkpoint.interrupted import STATE
from headfuse.checkpoint.writer import SafetensorsWriter, mapped_tensor
from headfuse.config.presets import PRESETS
from headfuse.conversion.conversion import Conversion, FusedModel
from headfuse.conversion.result import Stage
from headfuse.estimates import average
from headfuse.fusion import FUSION_METHODS
from headfuse.models.decoder_layers import DecoderLayers
from headfuse.models.heap import release_freed_blocks
from headfuse.models.logits import kl_divergence
from headfuse.models.placement import REFINED_BYTES, optimizer_device
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan

logger = logging.getLogger(__name__)

LEARNING_RATE, FINAL_LEARNING_RATE, WARMUP_STEPS = 1e-3, 0.05, 5
FULL_RATE_WIDTH = 256
"""Wider models learn at a rate that falls as 1 / hidden_size."""
WIDE_RATE = 0.5
"""Learning rate of wide heads relative to others: at the full rate they get worse if little was lost
(docs/experiments).
"""
BETAS, EPSILON = (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Targets:
    """Token windows `[n, T]` and the source's last hidden states on them `[n, T, D]`, which its head reads."""

    windows: torch.Tensor
    hidden: torch.Tensor


class Adam:
    """Weights in float32 with their moments (Kingma and Ba, 1412.6980, algorithm 1).

    Args:
        folder: for the weights' files; those of an earlier process are used as they are.
        shapes: of the weights, by name.
        device: in whose memory all of it lies, zeros to begin with; None: in mapped files, which the system writes
            to disk again and again.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Sequence[int]], device: torch.device | None = None) -> None:
        def mapped(part: str) -> dict[str, torch.Tensor]:
            return {name: mapped_tensor(folder / f"{name}.{part}", shape) for name, shape in shapes.items()}

        def zeros() -> dict[str, torch.Tensor]:
            return {name: torch.zeros(tuple(shape), device=device) for name, shape in shapes.items()}

        self.folder, self.files = folder, mapped("weight")
        if device is None:
            self.weights, self.means, self.squares = self.files, mapped("mean"), mapped("square")
        else:
            self.weights, self.means, self.squares = zeros(), zeros(), zeros()

    def sync(self) -> None:
        """Flush the weights to disk."""
        for name, weight in self.weights.items():
            if weight is not self.files[name]:
                self.files[name].copy_(weight)
            sync(self.folder / f"{name}.weight")

    def step(self, name: str, gradient: torch.Tensor, rate: float, step: int) -> None:
        """Update one weight; `step` counts from 1."""
        mean, square = self.means[name], self.squares[name]
        gradient = gradient.to(mean)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        root = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
        self.weights[name].addcdiv_(mean, root, value=-rate / (1 - BETAS[0] ** step))


def refine_model(
    streamed: StreamedModel,
    layers: DecoderLayers,
    optimizer: Adam,
    text: Targets,
    passes: float,
    seed: int,
    on_step: Callable[[int, int], None],
    wide: bool = False,
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
        wide: its heads are wide.
    """
    steps, rate = round(len(text.windows) * passes), learning_rate(text.hidden.shape[-1], wide)
    for step, index in zip(range(1, steps + 1), _shuffled(len(text.windows), seed), strict=False):
        *inputs, states = layers.forward(streamed.embed(text.windows[index : index + 1]), optimizer.weights)

        def divergence(logits: torch.Tensor, part: slice, target: torch.Tensor = text.hidden[index]) -> torch.Tensor:
            with torch.no_grad():
                wanted = streamed.logits(target[part])
            return kl_divergence(logits, wanted) / len(target)

        release_freed_blocks()  # of the layers, then of the logits
        gradient, now = streamed.end_gradient(states, divergence), rate * _schedule(step, steps)
        release_freed_blocks()
        of_shared = dict[int, list[torch.Tensor]]()
        for layer_idx in reversed(range(streamed.num_layers)):
            gradient, of_weights = layers.backward(layer_idx, inputs.pop(), gradient, optimizer.weights, of_shared)
            for name, value in of_weights.items():
                optimizer.step(name, value, now, step)
        on_step(step, steps)


def learning_rate(hidden_size: int, wide: bool = False) -> float:
    """The highest learning rate; Adam's steps on a matrix do more, the wider it is (muP, 2203.03466)."""
    return LEARNING_RATE * min(1.0, FULL_RATE_WIDTH / hidden_size) * (WIDE_RATE if wide else 1.0)


def _schedule(step: int, steps: int) -> float:
    """The learning rate of a step relative to the peak: a short warm-up, then linear to its final value."""
    return min(1.0, step / WARMUP_STEPS) * (1 - (1 - FINAL_LEARNING_RATE) * (step - 1) / steps)


def _shuffled(windows: int, seed: int) -> Iterator[int]:
    """Window indices, every pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(windows, generator=generator).tolist()


REFINED = Path(STATE, "refined", "nll.json")
"""Marks the refinement beside it as complete, and holds the NLL that it reached."""
NEGLIGIBLE_NLL = 1e-4
"""NLL differences below this (nats) are rounding error; refining would only add noise."""


@dataclass(frozen=True)
class Refinement:
    """Whether and how long a preset refines, and the seed of the order of the windows."""

    preset: str
    seed: int


def refinement_passes(preset: str, method: str) -> float:
    """How often each window is used; 0 leaves the closed form, and published baselines as they are."""
    return PRESETS[preset].model_passes if FUSION_METHODS[method].refits_output else 0.0


def refines(refinement: Refinement, plan: FusionPlan, held_out: tuple[float, ...], closed_form: Stage) -> bool:
    """Whether this model is refined: published baselines, and models that lost nothing, are not."""
    if not refinement_passes(refinement.preset, plan.method):
        return False
    before = average(held_out)
    if before is None or closed_form.nll is None:
        preset = refinement.preset
        logger.warning(
            "preset %s refines only if held-out text can confirm the gain, and no text is held out: nothing is refined",
            preset,
        )
        return False
    return closed_form.nll > before + NEGLIGIBLE_NLL


def refine(
    conversion: Conversion,
    fused: FusedModel,
    writer: SafetensorsWriter,
    targets: Targets,
    closed_form: Stage,
    refinement: Refinement,
) -> list[Stage]:
    """Refine the fused layers together; their weights are written only if the held-out loss falls.

    All of them are saved in the state folder before the first one is overwritten, so that an interrupted run can go on.
    """
    record = conversion.folder / REFINED
    folder, touched = record.parent, [layer.layer_idx for layer in fused.plan.layers if not layer.untouched]
    shapes = {name: writer.shapes[name] for name in fused.layers.attention_weights(touched)}
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    size = REFINED_BYTES * sum(map(math.prod, shapes.values()))
    place = optimizer_device(conversion.streamed.placement, conversion.streamed.device, size)
    optimizer = Adam(folder, shapes, place)
    if not record.exists():
        for name, weight in optimizer.weights.items():
            weight.copy_(fused.layers.tensor(name))

        def on_step(done: int, total: int) -> None:
            conversion.on_progress("refine", done, total)

        source, layers = conversion.streamed, fused.layers
        wide = any(layer.wide for layer in fused.plan.layers)
        passes = refinement_passes(refinement.preset, fused.plan.method)
        refine_model(source, layers, optimizer, targets, passes, refinement.seed, on_step, wide)
        refined = _held_out_nll(conversion, layers, writer, optimizer.weights)
        optimizer.sync()
        write_whole(record, json.dumps({"closed form": closed_form.held_out, "refined": refined}))
    figures = {name: tuple(held_out) for name, held_out in json.loads(record.read_text(encoding="utf-8")).items()}
    kept = math.fsum(figures["refined"]) < math.fsum(figures["closed form"])  # false for NaN, too
    for name, weight in optimizer.files.items() if kept else ():
        writer.write(name, weight)
    return [Stage(closed_form.name, figures["closed form"]), Stage("refined", figures["refined"], kept)]


def _held_out_nll(
    conversion: Conversion, layers: DecoderLayers, writer: SafetensorsWriter, weights: Mapping[str, torch.Tensor]
) -> tuple[float, ...]:
    """NLL of each held-out window with some weights, rounded as they would be written."""
    streamed, held_out = conversion.streamed, conversion.text.held_out
    states = streamed.embed(held_out)
    for layer_idx in range(len(layers)):
        prefix = layers.arch.layer_prefix(layer_idx) + "."
        own = {name: w.to(writer.dtypes[name]) for name, w in weights.items() if name.startswith(prefix)}
        states = layers.run(layer_idx, states, own)
    return streamed.nll(states, held_out)
