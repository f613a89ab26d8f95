"""Opens a model folder of any layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from headfuse.checkpoint.folder import resolve_model
from headfuse.checkpoint.hub import folder_name
from headfuse.checkpoint.plan_file import read_plan
from headfuse.checkpoint.reader import Checkpoint
from headfuse.errors import CheckpointError, UnsupportedModelError
from headfuse.layouts import decoupled, layerwise
from headfuse.layouts.assignment import HeadAssignment
from headfuse.models.config import raw_config, read_config
from headfuse.models.families import Architecture, architecture_of
from headfuse.models.heads import head_layout
from headfuse.models.model_code import warn_of_other_code
from headfuse.models.weights import ModelWeights, untie
from headfuse.plan import FusionPlan, HeadLayout

CACHE_BYTES = 2
"""Bytes of a number in llama.cpp's KV cache, f16 unless the user says otherwise."""


@dataclass(frozen=True)
class ModelFolder:
    """An opened model folder of any layout."""

    path: Path
    layout: Literal["decoupled", "layerwise", "gqa"]
    family: dict[str, Any]
    """config.json of the source's own class, whatever its number of KV heads."""
    config: PreTrainedConfig
    heads: HeadLayout
    maps: tuple[HeadAssignment, ...]
    checkpoint: Checkpoint
    plan: FusionPlan | None

    @classmethod
    def open(cls, model: str, trust_remote_code: bool = False) -> ModelFolder:
        """Open and check a folder.

        Raises:
            CheckpointError: for a folder that is missing, damaged or of a family that is not known.
            UnsupportedModelError: for key heads with rotary slots, which no stock class has.
        """
        path = resolve_model(model)
        loaded = read_config(path, trust_remote_code)
        warn_of_other_code(path)
        raw = raw_config(path)
        if hasattr(loaded, "key_widths"):
            raise UnsupportedModelError(
                "its key heads and value heads are wide (layout latent), and no stock class has such heads",
                where=path,
                fix="fuse the source with --layout gqa (every runtime) or --layout layerwise (vLLM, llama.cpp)",
            )
        layout: Literal["decoupled", "layerwise", "gqa"] = "gqa"
        family, maps = raw, None
        if loaded.model_type == "headfuse":
            layout, family = "decoupled", raw["source_config"]
            for layer_idx, slots in enumerate(loaded.rotary_slots or ()):
                if slots is not None:
                    raise UnsupportedModelError(
                        f"layer {layer_idx}: its key heads choose their rotary frequencies (rotary slots), which a "
                        "stock rotary embedding cannot compute",
                        where=path,
                        fix="fuse the source with --layout gqa or --layout layerwise, which keep the stock order",
                    )
            both = zip(loaded.key_head_of_query, loaded.value_head_of_query, strict=True)
            maps = tuple(HeadAssignment(tuple(keys), tuple(values)) for keys, values in both)
        elif hasattr(loaded, "num_key_value_heads_per_layer"):
            if str(loaded.source_model_type) not in layerwise.FAMILIES:
                raise CheckpointError(
                    f"source_model_type is {loaded.source_model_type!r}", where=path / "config.json",
                    fix="restore the config.json that headfuse wrote",
                )  # fmt: skip
            layout, family = "layerwise", layerwise.family_config(loaded.to_dict())
            counts = loaded.num_key_value_heads_per_layer
            maps = tuple(HeadAssignment.stock(loaded.num_attention_heads, count) for count in counts)
        fields = {name: value for name, value in family.items() if name != "model_type"}
        try:
            config = AutoConfig.for_model(family["model_type"], **fields)
        except Exception as error:  # the strict configs of transformers raise many kinds
            reason = " ".join(str(error).split())[:300]
            fix = "restore the config.json that headfuse wrote"
            raise CheckpointError(reason, where=path / "config.json", fix=fix) from None
        heads = head_layout(config, path / "config.json")
        if maps is None:
            maps = (
                HeadAssignment.stock(heads.num_attention_heads, heads.num_key_value_heads),
            ) * heads.num_hidden_layers
        plan = read_plan(path) if (path / "plan.json").exists() else None
        shape = ("num_hidden_layers", "num_attention_heads", "head_dim")
        if plan is not None and any(getattr(plan.heads, name) != getattr(heads, name) for name in shape):
            raise CheckpointError(
                "plan.json is of a model of another shape than config.json", where=path,
                fix="restore both as headfuse wrote them",
            )  # fmt: skip
        weights = ModelWeights.open(path, loaded)
        weights.report()
        if weights.untied:
            family, config.tie_word_embeddings = untie(family), False
        return cls(path, layout, family, config, heads, maps, weights.checkpoint, plan)

    @property
    def name(self) -> str:
        """The folder's name, without its path; of a repository, without its owner."""
        return folder_name(self.path).rsplit("/")[-1]

    @property
    def arch(self) -> Architecture:
        """How the folder stores its attention."""
        own = architecture_of(self.heads.model_type)
        return decoupled.stored(own) if self.layout == "decoupled" else own

    @property
    def num_heads(self) -> int:
        """Key heads and value heads of all layers."""
        sides = [(set(m.key_head_of_query), set(m.value_head_of_query)) for m in self.maps]
        return sum(len(keys) + len(values) for keys, values in sides)

    @property
    def source_heads(self) -> int:
        """Key heads and value heads of the source, as far as the folder says; else those of multi-head attention."""
        if self.plan is not None:
            return self.plan.heads.total_heads
        count = self.heads.num_attention_heads if self.layout == "layerwise" else self.heads.num_key_value_heads
        return 2 * self.heads.num_hidden_layers * count
