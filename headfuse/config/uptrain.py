"""Every option of `uptrain`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from headfuse.choices import Loss, Packing, Trained, names
from headfuse.config.loading import Options, load_options, one_of
from headfuse.config.values import Count, data_name, mixture_name, parse_data, parse_tokens
from headfuse.errors import DataError


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


class UptrainConfig(Options):
    """Everything but the model and its teacher that decides the trained weights."""

    data: Annotated[dict[str, float], BeforeValidator(_mixture)]
    """The texts with their shares of the tokens."""
    tokens: Annotated[int, BeforeValidator(_tokens), Field(ge=1, strict=True)]
    """How many tokens to train on; a text that is shorter is read again, shuffled anew."""
    packing: Annotated[str, one_of(*names(Packing))] = "joined"
    """joined: a token attends to earlier documents in its window; separate: only to its own document."""
    sequence_length: Annotated[int, Field(ge=2, strict=True)] = 512
    """Tokens in a window."""
    batch_size: Count | None = None
    """Windows in a forward pass of one process; null: 8, or fewer if `tokens` would give less than 500 steps."""
    gradient_accumulation: Count = 1
    """Forward passes in a step."""
    loss: Annotated[str, one_of(*names(Loss))] = "kl"
    """kl: forward divergence from the teacher over the full vocabulary at every token; ce: cross-entropy."""
    cross_entropy: Weight = 0.0
    """Weight of cross-entropy added to the divergence."""
    hidden: Weight = 0.0
    """Weight of the hidden-state term: squared relative error of every layer's output."""
    layerwise: Share = 0.0
    """Share of the steps, at the start, in which each layer alone learns the teacher's output from its input."""
    train: Annotated[str, one_of(*names(Trained))] = "all"
    """Which weights are trained: all, those of the attention, or low-rank adapters on it (lora)."""
    lora_rank: Count = 16
    """Rank of the adapters."""
    lora_alpha: Count = 32
    """Scale of the adapters (alpha), which is divided by the rank."""
    learning_rate: Rate | None = None
    """Peak learning rate; null: 2e-4 below 50 million parameters, 1e-4 below a billion, else 2e-5; 4 times that with
    lora.
    """
    fused_learning_rate: Rate = 2.0
    """Multiple of the learning rate for key and value projections (2 in mha2gqa)."""
    warmup: Share = 0.03
    """Share of the steps in which the learning rate rises to its peak."""
    final_learning_rate: Share = 0.1
    """Learning rate at the last step, as a share of the peak; it falls along a cosine."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay per step of the average of the weights (EMA) that is validated and written; 0: the weights themselves."""
    weight_decay: Weight = 0.0
    """Weight decay of AdamW."""
    gradient_clip: Rate = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: Literal[False, True, "selective"] = False
    """true: compute each layer again in the backward pass, for the least memory and some 15 % more time; selective: all
    of it but its matrix products and its attention.
    """
    validation_data: str | None = None
    """Text for validation; null: sections of `data` are held out."""
    validation_windows: Count = 16
    """Number of windows in a validation."""
    checkpoint_every: Count | None = None
    """Steps between two states, each with a validation; null: about a tenth of the run."""
    patience: Count | None = None
    """Stop after this many validations without a better one; null: never."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Seed of the order of the text."""

    @property
    def distilled(self) -> bool:
        """Whether the loss needs a teacher."""
        return self.loss == "kl" or self.hidden > 0 or self.layerwise > 0

    def named(self) -> dict[str, Any]:
        """Plain data for outputs, in which each text is reduced to its name."""
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


def load_recipe(name: str | None, overrides: Mapping[str, Any]) -> UptrainConfig:
    """The options of `headfuse uptrain`: a YAML file or a packaged recipe, under the command line.

    Raises:
        ConfigError: naming every problem with its place.
    """
    return load_options(UptrainConfig, name, overrides, "recipes")


def _distinct(data: Mapping[str, float], name_of: Callable[[str], str]) -> dict[str, float]:
    """The weights by shorter names; equal names get a number."""
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
