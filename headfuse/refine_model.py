"""Preset `best`: the attention of all layers refined together, towards the source's output distribution.

A smaller local error is not a smaller loss: errors compound, and most of a layer's error does not reach the end. This
stage sees the end alone: KL(source || fused) over the full vocabulary on the calibration text (math.md 2 and 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from headfuse.architectures import Architecture
from headfuse.distillation import Objective

LEARNING_RATE, FINAL_LEARNING_RATE, WARMUP_STEPS, GRADIENT_CLIP = 1e-3, 0.05, 5, 1.0


@dataclass(frozen=True)
class Targets:
    """Token windows `[n, T]` and the source's last hidden states on them `[n, T, D]`, which its head reads."""

    windows: torch.Tensor
    hidden: torch.Tensor


def attention_parameters(model: PreTrainedModel, arch: Architecture) -> dict[str, torch.nn.Parameter]:
    """The parameters of every layer's attention, by name."""
    prefixes = tuple(f"{arch.attention_prefix(i)}." for i in range(model.config.num_hidden_layers))
    return {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}


def refine_model(
    model: PreTrainedModel,
    arch: Architecture,
    text: Targets,
    passes: float,
    seed: int,
    on_step: Callable[[int, int], None],
) -> None:
    """Train the attention of a fused model in place; everything else stays as it is.

    Args:
        model: the fused model, in float32.
        arch: the family's table entry.
        text: the calibration text.
        passes: how often each window is used.
        seed: of the order of the windows.
        on_step: called with the steps done and all steps.
    """
    model.requires_grad_(False)
    trained = list(attention_parameters(model, arch).values())
    for parameter in trained:
        parameter.requires_grad_(True)
    objective = Objective(model)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    steps = round(len(text.windows) * passes)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step, index in zip(range(steps), _shuffled(len(text.windows), seed), strict=False):
        window, target = text.windows[index : index + 1], text.hidden[index : index + 1]
        loss = objective(window.to(model.device), targets=target.to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(step + 1, steps)
    model.requires_grad_(False)


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step relative to the peak: a short warm-up, then linear to its final value."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 - (1 - FINAL_LEARNING_RATE) * step / steps)


def _shuffled(windows: int, seed: int) -> Iterator[int]:
    """Window indices, every pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(windows, generator=generator).tolist()
