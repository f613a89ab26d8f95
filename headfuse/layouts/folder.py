"""Opens a model folder of any layout: its heads, the size of its KV cache, and how its tensors are stored."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from headfuse.checkpoint.finish import check_companions
from headfuse.checkpoint.folder import resolve_model
from headfuse.checkpoint.hub import folder_name
from headfuse.checkpoint.plan_file import plan_in
from headfuse.checkpoint.reader import Checkpoint
from headfuse.choices import Layout
from headfuse.errors import CheckpointError, UnsupportedModelError
from headfuse.layouts import layerwise
from headfuse.layouts.assignment import HeadAssignment
from headfuse.models.config import config_of, dtype_of, raw_config, read_config, with_dtype
from headfuse.models.families import Architecture
from headfuse.models.heads import head_dim, head_layout
from headfuse.models.model_code import warn_of_other_code
from headfuse.models.weights import ModelWeights, is_supported, stored_architecture, untie
from headfuse.plan import FusionPlan, HeadLayout

_OF_THE_FOLDER = {"model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}
"""Fields of a config that say nothing of how the model computes."""
_RESTORE = "restore the config.json that headfuse wrote"


def layout_of(config: PreTrainedConfig) -> Layout:
    """The layout of a model, by its loaded config; `gqa` for every stock class."""
    if hasattr(config, "key_widths"):
        return "latent"
    if config.model_type == "headfuse":
        return "decoupled"
    return "layerwise" if hasattr(config, "num_key_value_heads_per_layer") else "gqa"


def cached_heads(config: PreTrainedConfig) -> int:
    """Key heads and value heads in the KV cache, over all layers."""
    layout = layout_of(config)
    if layout == "decoupled":
        return sum(config.num_key_heads) + sum(config.num_value_heads)
    if layout == "layerwise":
        return 2 * sum(config.num_key_value_heads_per_layer)
    text = config.get_text_config()
    return 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def kv_bytes_per_token(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes that one token takes in the KV cache over all layers, at `itemsize` bytes a number."""
    if layout_of(config) == "latent":
        return sum(map(sum, (*config.key_widths, *config.value_widths))) * itemsize
    text = config.get_text_config() if layout_of(config) == "gqa" else config
    return cached_heads(config) * head_dim(text) * itemsize


@dataclass(frozen=True)
class ModelFolder:
    """An opened model folder of any layout.

    Parts that only some commands need are read on first use, and raise HeadfuseError then if they are damaged.
    """

    path: Path
    config: PreTrainedConfig
    """As transformers loads it."""
    weights: ModelWeights

    @property
    def name(self) -> str:
        """The folder's name, without its path; of a repository, without its owner."""
        return folder_name(self.path).rsplit("/")[-1]

    @property
    def layout(self) -> Layout:
        """The layout of its heads on disk."""
        return layout_of(self.config)

    @property
    def checkpoint(self) -> Checkpoint:
        """Its weight files."""
        return self.weights.checkpoint

    @cached_property
    def plan(self) -> FusionPlan | None:
        """Its plan.json; None where there is none."""
        return plan_in(self.path)

    @property
    def arch(self) -> Architecture:
        """How the folder stores its attention."""
        return stored_architecture(self.config, self.path / "config.json")

    @property
    def num_heads(self) -> int:
        """Key heads and value heads in the KV cache, over all layers."""
        return cached_heads(self.config)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token takes in the KV cache over all layers, at `itemsize` bytes a number."""
        return kv_bytes_per_token(self.config, itemsize)

    def raw_config(self) -> dict[str, Any]:
        """config.json for an output: see `models.config.raw_config`; without ties that the weights do not have."""
        raw = raw_config(self.path)
        return untie(raw) if self.weights.untied else raw

    @cached_property
    def family(self) -> dict[str, Any]:
        """config.json of the source's own class, whatever its number of KV heads."""
        raw = self.raw_config()
        if self.layout in ("decoupled", "latent"):  # whose models read a field of their own before the source's
            source = raw["source_config"]
            family = {**source, **{name: raw[name] for name in source.keys() & raw.keys() - _OF_THE_FOLDER}}
            return with_dtype(family, dtype_of(raw))
        if self.layout == "gqa":
            return raw
        model_type = str(getattr(self.config, "source_model_type", None))
        if model_type not in layerwise.FAMILIES:
            raise CheckpointError(f"source_model_type is {model_type!r}", where=self._config_path, fix=_RESTORE)
        family = layerwise.family_config(self.config.to_dict())
        return untie(family) if self.weights.untied else family

    @cached_property
    def family_config(self) -> PreTrainedConfig:
        """`family` as transformers loads it."""
        family = self.family
        try:
            return config_of(family)
        except Exception as error:  # the strict configs of transformers raise many kinds
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(reason, where=self._config_path, fix=_RESTORE) from None

    @cached_property
    def heads(self) -> HeadLayout:
        """The shape of the attention in the source's own class."""
        return head_layout(self.family_config, self._config_path)

    @cached_property
    def assignments(self) -> tuple[HeadAssignment, ...]:
        """The key head and the value head that each query head reads, layer by layer."""
        config, queries = self.config, self.heads.num_attention_heads
        if self.layout == "latent":
            raise wide_heads(self.path)
        if self.layout == "decoupled":
            both = zip(config.key_head_of_query, config.value_head_of_query, strict=True)
            return tuple(HeadAssignment(tuple(keys), tuple(values)) for keys, values in both)
        if self.layout == "layerwise":
            return tuple(HeadAssignment.stock(queries, count) for count in config.num_key_value_heads_per_layer)
        return (HeadAssignment.stock(queries, self.heads.num_key_value_heads),) * self.heads.num_hidden_layers

    @property
    def source_heads(self) -> int:
        """Number of key heads and value heads of the source, if the folder says; else that of multi-head attention."""
        if self.plan is not None:
            return self.plan.heads.total_heads
        count = self.heads.num_attention_heads if self.layout == "layerwise" else self.heads.num_key_value_heads
        return 2 * self.heads.num_hidden_layers * count

    @property
    def _config_path(self) -> Path:
        return self.path / "config.json"


def wide_heads(path: Path) -> UnsupportedModelError:
    """The error for a folder of layout latent where heads of a stock class are needed."""
    return UnsupportedModelError(
        "its key heads and value heads are wide (layout latent), and no stock class has widths or rotary slots "
        "that differ by layer, by group or by side",
        where=path,
        fix="fuse the source with --layout gqa --head-dim auto (every runtime) or --layout layerwise (vLLM, llama.cpp)",
    )


def open_folder(model: str, trust_remote_code: bool = False, *, any_family: bool = False) -> ModelFolder:
    """Open a model folder, or a model of the hub, of any layout.

    Args:
        model: folder or hub id.
        trust_remote_code: allow the model's own code.
        any_family: open a family that headfuse does not convert as well; its weights are then not compared with its
            config, and `arch`, `heads` and `assignments` may raise.

    Raises:
        CheckpointError: for a folder that is missing or damaged; with `any_family` its files of settings may be.
        UnsupportedModelError: for a family that is not supported, and for quantised weights.
    """
    path = resolve_model(model)
    if not any_family:
        check_companions(path)  # before any work
    config = read_config(path, trust_remote_code)
    warn_of_other_code(path)
    if any_family and not is_supported(config):
        return ModelFolder(path, config, ModelWeights(Checkpoint(path), untied=False, left_out=()))
    return ModelFolder(path, config, ModelWeights.open(path, deepcopy(config)))  # which building a model changes
