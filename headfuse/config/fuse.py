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
from headfuse.config.values import Count, HeadDim, Rate, Share, Steps


class BudgetConfig(Options):
    """How much of the KV cache is kept, and who decides where."""

    total: Share | SideBudget | None = "0.25"
    key_heads: tuple[Count, ...] | None = None
    value_heads: tuple[Count, ...] | None = None
    keep_layers: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()
    min_key_heads: Count = 1
    min_value_heads: Count = 1
    allocator: Annotated[str, one_of(*names(Allocator))] = "sensitivity"
    layerwise: bool = False
    head_dim: HeadDim | None = None
    """Channels of the fused heads of layout gqa; None: the source's."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> BudgetConfig:
        explicit = self.key_heads is not None and self.value_heads is not None
        if explicit and self.total is not None and "total" in self.model_fields_set:
            raise ValueError("give either total or key_heads and value_heads, not both")
        if self.total is None and not explicit:
            raise ValueError("without total, both key_heads and value_heads are needed")
        if isinstance(self.total, SideBudget) and (self.key_heads is not None or self.value_heads is not None):
            raise ValueError("key and value totals do not go with key_heads or value_heads")
        return self

    @property
    def shares(self) -> Fraction | tuple[Fraction, Fraction] | None:
        """The share of the cache, or one for keys and one for values; None where counts are given outright."""
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


HELD_OUT_WINDOWS = 8
"""Enough to compare two stages window by window; the other windows are worth more where something learns from them."""


class CalibrationConfig(Options):
    """The text that statistics are taken on."""

    data: str = "default"
    samples: Annotated[int, Field(ge=2, strict=True)] = 64
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 512
    held_out: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the windows that nothing is fitted to; None: a quarter, at most `HELD_OUT_WINDOWS`."""

    def held_out_windows(self, samples: int) -> int:
        """How many of `samples` windows are held out; at least one is left."""
        windows = min(round(samples / 4), HELD_OUT_WINDOWS) if self.held_out is None else round(samples * self.held_out)
        return min(windows, samples - 1)


class DhaConfig(Options):
    """The trainings of `method: dha`; defaults are the paper's where it tells them (docs/dha.md)."""

    search_steps: Steps = 240
    fusion_steps: Steps = 1000
    """At most, over all rounds."""
    progressive: bool = True
    """Rounds that halve the heads; else one round to the final groups."""
    b: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Base of the decaying target of the fusion loss."""
    k: Count | None = None
    """Steps of a round until that target is zero; by default half of the round."""
    stop: Annotated[float, Field(ge=0)] = 1e-3
    """The fusion loss at which a round ends."""
    raw_fusion_loss: bool = False
    """The paper's sum over channels, pairs, groups and layers, instead of the mean."""
    loss: Annotated[str, one_of(*names(Loss))] = "ce"
    start: Annotated[str, one_of(*names(StartingBasis))] = "raw"
    """The basis in which heads are mixed: their own, or that of another method's maps."""
    learning_rate: Rate = 1e-4
    omega_learning_rate: Rate = 1e-2
    lambda_learning_rate: Rate = 1e-2
    lambda_start: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Count = 64
    micro_batch_size: Count = 8
    """Windows in a forward pass."""
    checkpoint_every: Count = 100


class FuseConfig(Options):
    """Every option of `headfuse fuse`."""

    budget: BudgetConfig = BudgetConfig()
    method: Annotated[str, one_of(*names(Method))] = "subspace"
    grouping: Annotated[str, one_of(*names(Grouping))] = "cluster"
    layout: Layout = "decoupled"
    preset: Annotated[str, one_of(*names(Preset))] = "balanced"
    calibration: CalibrationConfig = CalibrationConfig()
    dha: DhaConfig = DhaConfig()
    seed: Annotated[int, Field(ge=0, strict=True)] = 0

    @model_validator(mode="before")
    @classmethod
    def _as_the_paper(cls, raw: Any) -> Any:
        """Method dha has its own allocator and grouping where none are given."""
        if not isinstance(raw, dict) or raw.get("method") != "dha":
            return raw
        budget = raw.get("budget") or {}
        if isinstance(budget, BudgetConfig):
            budget = budget.model_dump(exclude_unset=True)
        if isinstance(budget, dict):
            budget = {"allocator": "dha-greedy", **budget}
        return {"grouping": "anneal", **raw, "budget": budget}

    @model_validator(mode="after")
    def _dha_is_decoupled(self) -> FuseConfig:
        if self.method == "dha" and self.layout != "decoupled":
            raise ValueError(f"method dha gives keys and values heads of their own: layout {self.layout} has none")
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
