"""Steps, batch sizes and learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headfuse.config.uptrain import UptrainConfig

LEARNING_RATES = ((50e6, 2e-4), (1e9, 1e-4), (math.inf, 2e-5))
"""Default peak learning rates, as (fewer parameters than this, rate). The first was measured on a 6M model."""
LORA_LEARNING_RATES = 4.0
"""Factor on the default rate for adapters: they start at zero and need larger steps."""


def default_batch_size(tokens: int, tokens_per_window: int) -> int:
    """Windows in a batch: 8, or fewer so that there are 500 steps; with few tokens, more steps recover more."""
    return max(1, min(8, tokens // (500 * max(1, tokens_per_window))))


def with_batch_size(recipe: UptrainConfig, processes: int) -> UptrainConfig:
    """The recipe with a batch size: its own, or the default one."""
    if recipe.batch_size is not None:
        return recipe
    per_window = recipe.gradient_accumulation * recipe.sequence_length * processes
    return recipe.model_copy(update={"batch_size": default_batch_size(recipe.tokens, per_window)})


def num_steps(tokens: int, tokens_per_step: int) -> int:
    """Number of optimizer steps: the one that comes nearest to the tokens, at least one."""
    return max(1, round(tokens / tokens_per_step))


def default_checkpoint_every(steps: int, windows_per_step: int, validation_windows: int) -> int:
    """Steps between validations: ten validations, or fewer if they would take more than a tenth of the time.

    A window takes about four forward passes to train on (teacher, forward, backward) and one to validate on.
    """
    validations = 0.1 * 4 * steps * windows_per_step / max(1, validation_windows)
    return max(10, math.ceil(steps / min(10, max(1, validations))))


@dataclass(frozen=True)
class Steps:
    """How a run is divided: `windows` and `tokens` are those of one step over all processes.

    The first `layerwise` steps train each layer alone; `every` steps lie between two states.
    """

    number: int
    windows: int
    tokens: int
    layerwise: int
    every: int


def windows_per_step(recipe: UptrainConfig, processes: int) -> int:
    """Windows that one optimizer step reads, over all processes."""
    assert recipe.batch_size is not None
    return recipe.batch_size * recipe.gradient_accumulation * processes


def divide(recipe: UptrainConfig, processes: int, validation_windows: int) -> Steps:
    """The steps of a recipe whose batch size is known."""
    windows = windows_per_step(recipe, processes)
    tokens = windows * recipe.sequence_length
    number = num_steps(recipe.tokens, tokens)
    every = recipe.checkpoint_every or default_checkpoint_every(number, windows, validation_windows)
    return Steps(number, windows, tokens, math.ceil(recipe.layerwise * number), every)


def cosine(angle: float, final: float) -> float:
    """A learning rate relative to its peak: 1 at angle 0, `final` at angle pi."""
    return final + (1 - final) * (1 + math.cos(angle)) / 2


def learning_rate_at(step: int, steps: int, recipe: UptrainConfig) -> float:
    """The learning rate of a step, counted from 0, relative to the peak: linear warm-up, then a cosine."""
    warmup = math.ceil(recipe.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return cosine(math.pi * progress, recipe.final_learning_rate)


def default_learning_rate(parameters: float, train: str = "all") -> float:
    """The peak learning rate for a model with this many parameters."""
    rate = next(rate for limit, rate in LEARNING_RATES if parameters < limit)
    return rate * (LORA_LEARNING_RATES if train == "lora" else 1.0)
