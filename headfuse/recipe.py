"""The recipe of an uptraining run: its options, packaged ones by name, and its learning rates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field

from headfuse.config import Count, Strict, load_options, one_of
from headfuse.errors import DataError
from headfuse.text import data_name, mixture_name, parse_data

LOSSES = ("kl", "ce")
PACKING = ("joined", "separate")
TRAINED = ("all", "attention", "lora")

LEARNING_RATES = ((50e6, 2e-4), (1e9, 1e-4), (math.inf, 2e-5))
"""Default peak learning rates: (below so many parameters, rate). The first was measured on a model of 6 M."""
LORA_LEARNING_RATES = 4.0
"""Default of adapters, as a multiple: they start at zero and need larger steps."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_tokens(text: str) -> int:
    """A number of tokens: `246000`, `500k`, `50M` or `1.5B`.

    Raises:
        ValueError: for anything else, and for less than one token.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().replace("_", "").upper())
    tokens = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if tokens < 1:
        raise ValueError(f"{text!r} is not a number of tokens such as 246000, 500k, 50M or 1.5B")
    return tokens


def _tokens(value: Any) -> Any:
    return parse_tokens(value) if isinstance(value, str) else value


def _mixture(value: Any) -> Any:
    try:
        return parse_data(value)
    except DataError as error:
        raise ValueError(f"{error.where}: {error.what}") from None
    except (TypeError, ValueError, AttributeError):
        raise ValueError("give a text, a list of texts, or texts with their weights") from None


Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Recipe(Strict):
    """Everything but the model and its teacher that decides the trained weights."""

    data: Annotated[dict[str, float], BeforeValidator(_mixture)]
    """The texts with their shares of the tokens."""
    tokens: Annotated[int, BeforeValidator(_tokens), Field(ge=1, strict=True)]
    """How many tokens to train on; the text is read again, shuffled anew, where it ends before."""
    packing: Annotated[str, one_of(*PACKING)] = "joined"
    """Whether a token sees the documents before its own in the window (`joined`), or its own alone (`separate`)."""
    sequence_length: Annotated[int, Field(ge=2, strict=True)] = 512
    batch_size: Count | None = None
    """Windows in a forward pass of one process; by default 8, fewer where the tokens would not give 500 steps."""
    gradient_accumulation: Count = 1
    loss: Annotated[str, one_of(*LOSSES)] = "kl"
    """Forward divergence from the teacher over the full vocabulary at every token, or cross-entropy."""
    cross_entropy: Weight = 0.0
    """Weight of cross-entropy beside the divergence."""
    hidden: Weight = 0.0
    """Weight of the hidden-state term: squared relative error of every layer's output."""
    layerwise: Share = 0.0
    """Share of the steps, at the start, in which each layer alone learns the teacher's output from its input."""
    train: Annotated[str, one_of(*TRAINED)] = "all"
    lora_rank: Count = 16
    lora_alpha: Count = 32
    learning_rate: Rate | None = None
    """The peak; by default 2e-4 below 50 million parameters, 1e-4 below a billion, else 2e-5; LoRA 4 times that."""
    fused_learning_rate: Rate = 2.0
    """The learning rate of key and value projections, as a multiple (2 in mha2gqa)."""
    warmup: Share = 0.03
    final_learning_rate: Share = 0.1
    weight_decay: Weight = 0.0
    gradient_clip: Rate = 1.0
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass: less memory for longer windows, a third more time."""
    validation_data: str | None = None
    """The text of the figures; by default sections of `data` are held out for them."""
    validation_windows: Count = 16
    checkpoint_every: Count | None = None
    """Steps between two states, each with a validation; by default about a tenth of the run."""
    patience: Count | None = None
    """Stop after so many validations without a better one."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0

    @property
    def distilled(self) -> bool:
        """Whether the loss needs a teacher."""
        return self.loss == "kl" or self.hidden > 0 or self.layerwise > 0

    def named(self) -> dict[str, Any]:
        """Plain data in which texts have their names alone, as an output may hold it."""
        names = _distinct(self.data, data_name)
        validation = self.validation_data and data_name(self.validation_data)
        return {**self.model_dump(mode="json"), "data": names, "validation_data": validation}

    @property
    def data_name(self) -> str:
        """The texts in words."""
        return mixture_name(self.data)

    def to_yaml(self) -> str:
        """The YAML that reproduces this recipe; a text at an absolute path is named by its file alone."""
        data = self.model_dump(mode="json", exclude_none=True)
        data["data"] = _distinct(self.data, _relative)
        if self.validation_data:
            data["validation_data"] = _relative(self.validation_data)
        return yaml.safe_dump(data, sort_keys=False)


def load_recipe(name: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The options of `headfuse uptrain`: a YAML file or a packaged recipe, under the command line.

    Raises:
        ConfigError: naming every problem with its place.
    """
    return load_options(Recipe, name, overrides, "recipes", "docs/uptraining.md has every key")


def _distinct(data: Mapping[str, float], name_of: Callable[[str], str]) -> dict[str, float]:
    """The weights by shorter names, which get a number where two are the same."""
    names: dict[str, float] = {}
    for text, weight in data.items():
        short = name = name_of(text)
        number = 1
        while name in names:
            number += 1
            name = f"{short} ({number})"
        names[name] = weight
    return names


def _relative(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


# ---------------------------------------------------------------- steps and rates


def default_batch_size(tokens: int, tokens_per_window: int) -> int:
    """Windows in a batch: 8, or fewer to take 500 steps; with few tokens, more steps recover more."""
    return max(1, min(8, tokens // (500 * max(1, tokens_per_window))))


def num_steps(tokens: int, tokens_per_step: int) -> int:
    """Optimizer steps: the number whose tokens come nearest, at least one."""
    return max(1, round(tokens / tokens_per_step))


def default_checkpoint_every(steps: int, windows_per_step: int, validation_windows: int) -> int:
    """Steps between two validations: ten of them, fewer where they would take more than a tenth of the time.

    A window takes about four forward passes to train on (teacher, forward, backward) and one to validate on.
    """
    validations = 0.1 * 4 * steps * windows_per_step / max(1, validation_windows)
    return max(10, math.ceil(steps / min(10, max(1, validations))))


def learning_rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of a step, counted from 0, relative to the peak: linear warm-up, then a cosine."""
    warmup = math.ceil(recipe.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return recipe.final_learning_rate + (1 - recipe.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


def default_learning_rate(parameters: float, train: str = "all") -> float:
    """The peak learning rate for a model of so many parameters."""
    rate = next(rate for limit, rate in LEARNING_RATES if parameters < limit)
    return rate * (LORA_LEARNING_RATES if train == "lora" else 1.0)
