"""The stored tensors of a model, by the rules of transformers: names, ties, ignored and missing tensors."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from headfuse.checkpoint.reader import Checkpoint
from headfuse.errors import CheckpointError
from headfuse.models.attention import module_tensors
from headfuse.models.families import ARCHITECTURES, Architecture, architecture_of
from headfuse.models.loading import model_without_weights

logger = logging.getLogger(__name__)
_COMPUTED = r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$"
"""Stored tensors that transformers computes, besides those that a class names in _keys_to_ignore_on_load_unexpected."""
_OTHER_SOURCE = "config.json and the weights do not belong together: restore both from one source"
WITH_A_SOURCE = ("headfuse", "headfuse_latent")
"""Model types whose config holds that of the source."""
_NAMED = 3
"""Most tensors that a message names."""


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model.

    Attributes:
        checkpoint: shows the tensors that the model has, by its names, experts one by one.
        untied: config.json ties the embeddings of input and output, and the file holds two different ones, so that
            they are not tied.
        left_out: stored tensors that the model does not have.
    """

    checkpoint: Checkpoint
    untied: bool
    left_out: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, config: PreTrainedConfig) -> ModelWeights:
        """The weights in a folder of any layout, checked against its config; reads headers, and of tied tensors both.

        Raises:
            CheckpointError: for files that are damaged, and tensors that are missing or do not match the config.
            UnsupportedModelError: for a family that is not supported, and for quantised weights.
        """
        return cls.choose(Checkpoint(folder), config)

    @classmethod
    def choose(cls, checkpoint: Checkpoint, config: PreTrainedConfig) -> ModelWeights:
        """As `open`, of an opened checkpoint that shows its tensors as they are stored."""
        arch = stored_architecture(config, checkpoint.folder / "config.json")
        model = model_without_weights(config, checkpoint.folder, "eager")
        names, further = model_names(checkpoint, arch, config)
        shapes = {name: checkpoint.shapes[stored] for stored, name in names.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        ties = dict(model.all_tied_weights_keys)
        for target, source in ties.items():
            if source not in shapes and target in shapes:  # written under the name of the other
                shapes[source] = shapes.pop(target)
                names = {stored: source if name == target else name for stored, name in names.items()}
        held = _held(shapes, arch, config.num_hidden_layers)
        checkpoint.show(names)
        _check(checkpoint, held, expected, ties, arch, model.config)
        both = [target for target in ties if target in held]
        same = {target for target in both if _equal(checkpoint, target, ties[target])}
        unknown = held.keys() - expected.keys()
        checkpoint.show({stored: name for stored, name in names.items() if name not in unknown | same})
        computed = re.compile("|".join((_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))))
        left_out = [stored for stored, name in names.items() if name in unknown and not computed.search(name)]
        return cls(checkpoint, len(same) < len(both), (*further, *left_out))

    def report(self) -> None:
        """Log once which tensors are left out or untied."""
        if self.left_out:
            logger.warning(
                "%s: left out, as transformers does, %d tensor%s that the model of config.json does not have: %s",
                self.checkpoint.folder.resolve().name, len(self.left_out), "s" * (len(self.left_out) > 1),
                shown_names(self.left_out),
            )  # fmt: skip
        if self.untied:
            logger.warning(
                "%s: config.json ties the output embeddings to the input embeddings, but the file holds two"
                " different ones: both are used, as in transformers",
                self.checkpoint.folder.resolve().name,
            )


def is_supported(config: PreTrainedConfig) -> bool:
    """Whether a model, of any layout, is of a family that headfuse converts."""
    return config.model_type in {*ARCHITECTURES, *WITH_A_SOURCE} or hasattr(config, "source_model_type")


def shown_names(names: tuple[str, ...] | list[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:_NAMED]) + ", ..." * (len(names) > _NAMED)


def untie(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json, of any layout, with embeddings of the output that are not those of the input."""
    if "source_config" in raw:
        return {**raw, "source_config": untie(raw["source_config"])}
    return {**raw, "tie_word_embeddings": False}


def stored_architecture(config: Any, where: object = None) -> Architecture:
    """How a model of any layout stores its attention.

    Raises:
        UnsupportedModelError: for a family that is not supported.
    """
    if config.model_type in WITH_A_SOURCE:
        return architecture_of(config.source_config.model_type).decoupled()
    return architecture_of(getattr(config, "source_model_type", None) or config.model_type, where)


def model_names(
    checkpoint: Checkpoint, arch: Architecture, config: PreTrainedConfig
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The model's name of each stored tensor, and the stored tensors of layers behind its last one.

    These are layers that its class ignores, such as the one of GLM-4.5 that predicts a further token, which
    transformers does not compute.
    """
    names = arch.model_names(checkpoint.shapes)
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    ignored = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ("(?!)",)))
    beyond = {stored for stored, name in names.items() if _beyond(name, arch, config) and ignored.search(name)}
    own = {stored: name for stored, name in names.items() if stored not in beyond}
    return own, tuple(stored for stored in names if stored in beyond)


def _beyond(name: str, arch: Architecture, config: PreTrainedConfig) -> bool:
    """Whether a tensor is in a layer behind the model's last one."""
    layer_idx, _ = arch.place(name)
    return layer_idx is not None and layer_idx >= config.num_hidden_layers


def _held(shapes: dict[str, tuple[int, ...]], arch: Architecture, num_layers: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors as the modules hold them: experts stacked."""
    held = dict(shapes)
    for layer_idx in range(num_layers) if arch.stacked else ():
        prefix = arch.layer_prefix(layer_idx) + "."
        names = [name for name in held if name.startswith(prefix)]
        layer = {name.removeprefix(prefix): torch.empty(held.pop(name), device="meta") for name in names}
        held.update({prefix + name: tuple(tensor.shape) for name, tensor in module_tensors(layer, arch).items()})
    return held


def _check(
    checkpoint: Checkpoint,
    held: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    ties: dict[str, str],
    arch: Architecture,
    config: PreTrainedConfig,
) -> None:
    """Raise CheckpointError for tensors that are missing, of another shape or kind, or of layers that are too many."""
    problems = [f"{name} is missing" for name in expected if name not in held and name not in ties]
    fix = _no_head(config) if problems == ["lm_head.weight is missing"] else _OTHER_SOURCE
    problems += [
        f"{name} has shape {list(shape)}, config.json makes it {list(expected[name])}"
        for name, shape in held.items()
        if name in expected and shape != expected[name]
    ]
    problems += [
        f"{name} holds {str(dtype).removeprefix('torch.')} numbers, not weights"
        for name, dtype in checkpoint.dtypes.items()
        if not dtype.is_floating_point and (name in expected or name not in held)  # not held: a part of one that is
    ]
    problems += [f"{name} is not in the model of config.json" for name in held if _beyond(name, arch, config)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"tensor {problems[0]}{more}", where=checkpoint.folder, fix=fix)


def _no_head(config: PreTrainedConfig) -> str:
    names = getattr(config, "architectures", None) or ["this"]
    return (
        f"{names[0]} is a model without a head, such as an embedding model: give a causal language model; if it "
        "is one, restore its config.json (tie_word_embeddings)"
    )


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two stored tensors hold the same numbers."""
    first, second = checkpoint.read(name), checkpoint.read(other)
    return torch.equal(first.float(), second.float()) if first.dtype != second.dtype else torch.equal(first, second)
