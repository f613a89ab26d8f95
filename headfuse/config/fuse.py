"""Every option of `fuse` and `analyze`."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from headfuse.choices import Allocator, Grouping, Layout, Loss, Method, Preset, StartingBasis, names
from headfuse.config.loading import Options, SideBudget, load_options, one_of
from headfuse.config.values import Count, HeadDim, Part, Rate, Share, Steps


class BudgetConfig(Options):
    """How much of the KV cache is kept, and how it is divided among layers."""

    total: Share | SideBudget | None = "0.25"
    """Share of the source's KV cache that is kept, such as 0.25 or 1/4, or {key: 1/4, value: 1/8}."""
    key_heads: tuple[Count, ...] | None = None
    """Instead of `total`: the number of key heads of each layer, such as [4, 2, 2, 1]."""
    value_heads: tuple[Count, ...] | None = None
    """Instead of `total`: the number of value heads of each layer."""
    keep_layers: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()
    """Layers that are not fused, counted from 0."""
    min_key_heads: Count = 1
    """Fewest key heads that a layer may keep."""
    min_value_heads: Count = 1
    """Fewest value heads that a layer may keep."""
    min_channels: Count | None = None
    """Layout latent: fewest channels that a layer may keep of its keys, and of its values; by default half of an equal
    share, with `--for vllm` at least 32."""
    allocator: Annotated[str, one_of(*names(Allocator))] = "auto"
    """How the budget is divided among layers: auto, sensitivity, shrinkage, taylor, shapley, dha-greedy or uniform.
    auto is sensitivity; with layout latent uniform, unless sensitivity or shrinkage loses less on other text."""
    layerwise: bool = False
    """Give every layer as many value heads as key heads (layout latent: values as wide as keys). `--for vllm` does."""
    head_dim: HeadDim | None = None
    """Width of the fused heads of layout gqa in channels, or auto; by default the source's."""
    cross_layer: Count | None = None
    """Layout latent: how many layers before it a layer reads, beside what it caches itself; by default none."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> BudgetConfig:
        explicit = self.key_heads is not None and self.value_heads is not None
        if explicit and self.total is not None and "total" in self.model_fields_set:
            raise ValueError("give either total or key_heads and value_heads, not both")
        if self.total is None and not explicit:
            raise ValueError("without total, both key_heads and value_heads are needed")
        if isinstance(self.total, SideBudget) and (self.key_heads is not None or self.value_heads is not None):
            raise ValueError("give either totals for keys and values, or key_heads and value_heads, not both")
        if self.head_dim is not None and (self.min_channels or 1) > 1:
            raise ValueError("min_channels is for layers of free widths: with head_dim all layers have one width")
        return self

    @property
    def shares(self) -> Fraction | tuple[Fraction, Fraction] | None:
        """The share of the cache, or one for keys and one for values; None if counts are given instead."""
        if isinstance(self.total, SideBudget):
            return Fraction(self.total.key), Fraction(self.total.value)
        if self.total is None or (self.key_heads is not None and self.value_heads is not None):
            return None
        return Fraction(self.total)

    @property
    def label(self) -> str:
        """A short name of the budget, for folders and plans."""
        if self.shares is None:
            return "custom"
        if isinstance(self.total, SideBudget):
            return f"{self.total.key}-{self.total.value}".replace("/", "-")
        return str(self.total).replace("/", "-")


RANDOM_BESIDE_BUNDLED = 0.25
"""Who calibrates on the bundled text does not say what the model will read: its heads see every token there is
(docs/experiments/random-tokens.md)."""
HELD_OUT_WINDOWS = 8
"""Enough windows to compare two stages; further windows are worth more as calibration text."""


class CalibrationConfig(Options):
    """The calibration text, on which the heads are measured."""

    data: str = "default"
    """The calibration text: a file, a folder or a hub dataset. `default` is a bundled sample of prose and code."""
    samples: Annotated[int, Field(ge=2, strict=True)] = 64
    """How many windows of text are read."""
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 512
    """Tokens in a window."""
    held_out: Part | None = None
    """Share of the windows that nothing is fitted to; null: a quarter, at most 8 windows."""
    random_tokens: Part | None = None
    """Share of random windows in what the closed form is fitted to, for languages that the text lacks; null: a quarter
    beside the bundled text, none beside your own. They join the text, and hold tokens drawn from the vocabulary.
    Plans are made and models refined on text alone."""

    @property
    def random_windows(self) -> int:
        """How many windows of random tokens join those of text that are not held out."""
        share = self.random_tokens
        if share is None:
            share = RANDOM_BESIDE_BUNDLED if self.bundled else 0.0
        return round((self.samples - self.held_out_windows(self.samples)) * share / (1 - share))

    @property
    def bundled(self) -> bool:
        """Whether the text is that of the package."""
        return self.data == "default"

    def held_out_windows(self, samples: int) -> int:
        """How many of `samples` windows are held out; at least one is left."""
        windows = min(round(samples / 4), HELD_OUT_WINDOWS) if self.held_out is None else round(samples * self.held_out)
        return min(windows, samples - 1)


class DhaConfig(Options):
    """The trainings of `method: dha`; defaults are the paper's, where it states them (docs/how-it-works/dha.md)."""

    search_steps: Steps = 240
    """Training steps of the search."""
    fusion_steps: Steps = 1000
    """Training steps of all rounds of fusion together, at most."""
    progressive: bool = True
    """Fuse in rounds, each of which halves the heads; false: one round to the final groups."""
    b: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Base of the decaying target of the fusion loss."""
    k: Count | None = None
    """Steps of a round until the target of the fusion loss is zero; null: half of the round."""
    stop: Annotated[float, Field(ge=0)] = 1e-3
    """The fusion loss at which a round ends."""
    raw_fusion_loss: bool = False
    """Compute the fusion loss as the paper's sum over channels, pairs, groups and layers, instead of the mean."""
    loss: Annotated[str, one_of(*names(Loss))] = "ce"
    """Loss of the outputs: cross-entropy (ce), or KL divergence from the source (kl)."""
    start: Annotated[str, one_of(*names(StartingBasis))] = "raw"
    """The basis in which heads are mixed: their own (raw), or that of method align or subspace."""
    learning_rate: Rate = 1e-4
    """Peak learning rate of the model's weights."""
    omega_learning_rate: Rate = 1e-2
    """Peak learning rate of the fusion ratios."""
    lambda_learning_rate: Rate = 1e-2
    """Peak learning rate of the multiplier of the fusion loss."""
    lambda_start: Annotated[float, Field(ge=0)] = 0.0
    """Multiplier of the fusion loss at the first step."""
    batch_size: Count = 64
    """Windows in a step."""
    micro_batch_size: Count = 8
    """Windows in a forward pass."""
    checkpoint_every: Count = 100
    """Steps between two states that --resume can continue from."""


class FuseConfig(Options):
    """Every option of `headfuse fuse`."""

    budget: BudgetConfig = BudgetConfig()
    """How much of the KV cache is kept, and how it is divided among layers."""
    method: Annotated[str, one_of(*names(Method))] = "subspace"
    """How heads are fused: subspace, align, mean or first; dha trains the model."""
    grouping: Annotated[str, one_of(*names(Grouping))] = "cluster"
    """Which heads are fused together: cluster (similar ones), neighbours or anneal."""
    layout: Layout = "latent"
    """The format of the output: latent, decoupled, layerwise or gqa. Leave it out for latent, or decoupled where latent
    does not fit the model or the other options."""
    max_positions: Count | None = None
    """Layout latent: tokens of the longest text that the fused model is for; null: the source's. With fewer, more
    rotary planes hardly turn and need not be turned, so the same bytes lose less."""
    preset: Annotated[str, one_of(*names(Preset))] = "balanced"
    """How much work is spent on quality: fast, balanced or best."""
    calibration: CalibrationConfig = CalibrationConfig()
    """The calibration text, on which the heads are measured."""
    dha: DhaConfig = DhaConfig()
    """Options that only method dha reads."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Seed of the calibration windows and of every other random choice."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_paper(cls, raw: Any) -> Any:
        """Method dha has its own allocator, grouping and layout where none are given."""
        if not isinstance(raw, dict) or raw.get("method") != "dha":
            return raw
        budget = raw.get("budget") or {}
        if isinstance(budget, BudgetConfig):
            budget = budget.model_dump(exclude_unset=True)
        if isinstance(budget, dict):
            budget = {"allocator": "dha-greedy", **budget}
        return {"grouping": "anneal", "layout": "decoupled", **raw, "budget": budget}

    @model_validator(mode="after")
    def _dha_is_decoupled(self) -> FuseConfig:
        if self.method == "dha" and self.layout != "decoupled":
            raise ValueError(f"method dha groups keys and values apart: it needs layout decoupled, not {self.layout}")
        return self

    def to_yaml(self) -> str:
        """The YAML that reproduces this config; text at an absolute path is named by its file alone."""
        data = self.model_dump(mode="json", exclude_none=True)
        if Path(self.calibration.data).is_absolute():
            data["calibration"]["data"] = Path(self.calibration.data).name
        if self.budget.shares is None:
            data["budget"].pop("total", None)
        if self.method != "dha":
            data.pop("dha")
        return yaml.safe_dump(data, sort_keys=False)


def load_config(name: str | None, overrides: Mapping[str, Any]) -> FuseConfig:
    """The options of `headfuse fuse`: see `load_options`; a config that is packaged has a name."""
    return load_options(FuseConfig, name, overrides)
