"""ARCHITECTURES: one entry per model family, saying where its heads live. Adding a family is adding an entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from headfuse.errors import CheckpointError, UnsupportedModelError
from headfuse.plan import HeadLayout


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its attention projections, and how its keys are rotated.

    Tensor names are relative to the attention module; `{layer_idx}` stands for the layer.
    """

    layer: str = "model.layers.{layer_idx}"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    rotary: Literal["half"] = "half"
    """Planes of RoPE: `half` pairs channel i with i + head_dim / 2."""

    def layer_prefix(self, layer_idx: int) -> str:
        """Name of one decoder layer."""
        return self.layer.format(layer_idx=layer_idx)

    def attention_prefix(self, layer_idx: int) -> str:
        """Name of one layer's attention module."""
        return f"{self.layer_prefix(layer_idx)}.{self.attention}"


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
}


def architecture_of(model_type: str, where: object = None) -> Architecture:
    """The table entry of a family.

    Raises:
        UnsupportedModelError: naming the families that are supported.
    """
    if model_type not in ARCHITECTURES:
        if model_type in ("headfuse", "nemotron-nas"):
            raise UnsupportedModelError(
                "is already a model with heads of its own in every layer",
                where=where,
                fix="fuse the source model at the budget you want",
            )
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported",
            where=where,
            fix=f"supported: {', '.join(sorted(ARCHITECTURES))}",
        )
    return ARCHITECTURES[model_type]


def head_layout(config: Any, where: object = None) -> HeadLayout:
    """Read the heads of a supported model from its transformers config.

    Raises:
        UnsupportedModelError: for a family or a rotary style that is not supported.
        CheckpointError: for head counts that do not divide.
    """
    architecture_of(config.model_type, where)
    num_heads = config.num_attention_heads
    num_kv = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    for name, value in (
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_attention_heads", num_heads),
        ("num_key_value_heads", num_kv),
        ("head_dim", head_dim),
    ):
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{name} is {value}", where=where, fix="restore the model's own config.json")
    if num_heads % num_kv:
        raise CheckpointError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv}",
            where=where,
            fix="restore the model's own config.json",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0) or head_dim % 2:
        raise UnsupportedModelError(
            "keys that are rotated only in part are not supported",
            where=where,
            fix="choose a model whose whole heads are rotated, of an even head_dim",
        )
    return HeadLayout(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv,
        head_dim=head_dim,
    )


@dataclass
class AttentionWeights:
    """The projections of one layer, head by head.

    Shapes: `query [n_q, d, D]`, `key [n_k, d, D]`, `value [n_v, d, D]`, `output [D, n_q, d]`; biases `[n, d]` for
    query, key and value, `[D]` for the output, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_bias: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], arch: Architecture, head_dim: int) -> AttentionWeights:
        """Split an attention module's tensors (names relative to it) into heads."""

        def heads(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            return weight.view(-1, head_dim, weight.shape[-1]), None if bias is None else bias.view(-1, head_dim)

        (query, query_bias), (key, key_bias), (value, value_bias) = map(heads, (arch.query, arch.key, arch.value))
        output = tensors[f"{arch.output}.weight"]
        return cls(
            query, key, value, output.view(output.shape[0], -1, head_dim),
            query_bias, key_bias, value_bias, tensors.get(f"{arch.output}.bias"),
        )  # fmt: skip

    @classmethod
    def of_layer(cls, tensors: Mapping[str, torch.Tensor], arch: Architecture, head_dim: int) -> AttentionWeights:
        """The attention projections among a layer's tensors (names relative to the layer)."""
        prefix = arch.attention + "."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return cls.from_tensors(own, arch, head_dim)

    def in_layer(self, tensors: Mapping[str, torch.Tensor], arch: Architecture) -> dict[str, torch.Tensor]:
        """A layer's tensors with these projections in the place of its own."""
        return {**tensors, **{f"{arch.attention}.{name}": tensor for name, tensor in self.to_tensors(arch).items()}}

    def to_tensors(self, arch: Architecture) -> dict[str, torch.Tensor]:
        """The inverse of `from_tensors`."""
        tensors = {
            f"{arch.query}.weight": self.query.flatten(0, 1),
            f"{arch.key}.weight": self.key.flatten(0, 1),
            f"{arch.value}.weight": self.value.flatten(0, 1),
            f"{arch.output}.weight": self.output.flatten(1, 2),
            f"{arch.output}.bias": self.output_bias,
        }
        for name, bias in ((arch.query, self.query_bias), (arch.key, self.key_bias), (arch.value, self.value_bias)):
            tensors[f"{name}.bias"] = None if bias is None else bias.flatten()
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}
