"""Reads a model's config.json."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from headfuse.checkpoint.inputs import read_json
from headfuse.checkpoint.quantised import refuse_gguf, refuse_quantised_config
from headfuse.checkpoint.weight_files import INDEX, SINGLE
from headfuse.errors import CheckpointError, UnsupportedModelError
from headfuse.models.families import ARCHITECTURES

MAX_LAYERS = 10_000
"""Largest plausible value: transformers' configs make lists of this length, and a damaged number could fill memory."""


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model config of `folder`.

    Raises:
        CheckpointError: when config.json is missing, is not JSON, or holds values that the family refuses.
        UnsupportedModelError: when transformers does not know the model type.
    """
    path = folder / "config.json"
    if not os.path.exists(path):  # false, too, where the folder is closed
        refuse_gguf(folder)
    raw = read_json(path, "this is not a model folder; give the one that holds config.json and the weights")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("has no model_type", where=path, fix="use the config.json that came with the model")
    refuse_quantised_config(raw, path)
    _check_class(raw, path)
    named = raw.get("transformers_weights")
    if named not in (None, SINGLE, INDEX):
        raise UnsupportedModelError(
            f"transformers_weights names {named!r}, and headfuse reads {SINGLE} or {INDEX}", where=path,
            fix=f"load the model with transformers and save_pretrained it, which writes {SINGLE}",
        )  # fmt: skip
    fused = "headfuse_format" in raw
    if "auto_map" in raw and not fused and not trust_remote_code and not _is_known(model_type):
        raise UnsupportedModelError(
            f"model_type {model_type!r} needs its own code", where=path, fix="pass --trust-remote-code if you trust it"
        )
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise CheckpointError(
            f"num_hidden_layers is {layers}", where=path, fix="use the config.json that came with the model"
        )
    if fused:
        import headfuse.modeling  # noqa: F401  registers the layouts that have code of their own
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=needs_code(model_type, trust_remote_code))
    except Exception as error:  # the strict configs of transformers raise many kinds
        if not _is_known(model_type):
            raise UnsupportedModelError(
                f"model_type {model_type!r} is not known to the installed transformers",
                where=path,
                fix=f"supported: {', '.join(sorted(ARCHITECTURES))}",
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(reason, where=path, fix="use the config.json that came with the model") from None


def _check_class(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse a model whose head is not that of a language model; a base model without a head is accepted."""
    names = raw.get("architectures")
    if "vision_config" in raw:
        raise UnsupportedModelError(
            f"{names[0] if isinstance(names, list) and names else raw['model_type']} sees images, and headfuse fuses a"
            " language model alone",
            where=path,
            fix="take its text decoder out, fuse that, and put it back, as docs/guides/vision.md says",
        )
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and re.search(r"For(?!CausalLM)[A-Z]\w*$|RewardModel$", name):
            raise UnsupportedModelError(
                f"{name} is not a causal language model: its head is of another kind",
                where=path,
                fix="give a causal language model, such as the one that this model was trained from",
            )


def raw_config(folder: Path) -> dict[str, Any]:
    """config.json for an output, with the class of the model, and without what an output lacks.

    That is the source's path, names of its files, and the layers that predict further tokens. What headfuse writes is
    loaded by transformers' own classes, or by code that comes with headfuse.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    raw = read_json(folder / "config.json", "this is not a model folder")
    for part in (raw, raw.get("source_config")):
        if isinstance(part, dict):
            for field in ("_name_or_path", "transformers_weights"):
                part.pop(field, None)
            if "headfuse_format" not in part:
                part.pop("auto_map", None)
            if part.get("num_nextn_predict_layers"):
                part["num_nextn_predict_layers"] = 0
            stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(part.get("model_type")))
            if not part.get("architectures") and stock is not None:
                part["architectures"] = [stock]
    return raw


def dtype_of(raw: Mapping[str, Any]) -> str | None:
    """The dtype of the weights that a config.json names."""
    return raw.get("dtype") or raw.get("torch_dtype")


def with_dtype(raw: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config.json that names this dtype of the weights, and not by the field's older name; None: as it is."""
    if dtype is None:
        return dict(raw)
    return {**{name: value for name, value in raw.items() if name != "torch_dtype"}, "dtype": dtype}


def config_of(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that a config.json, with its `model_type`, describes, as transformers loads it."""
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    config: PreTrainedConfig = AutoConfig.for_model(raw["model_type"], **fields)
    return config


def needs_code(model_type: str, trust_remote_code: bool) -> bool:
    """Whether a model runs its own code: if that is trusted, and transformers has no class for the type.

    The fused model has transformers' class, so the source is measured by the same.
    """
    return trust_remote_code and not _is_known(model_type)


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING
