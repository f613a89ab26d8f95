"""Reads the heads of a model from its config."""

from __future__ import annotations

from typing import Any

from headfuse.errors import CheckpointError, UnsupportedModelError
from headfuse.models.families import Architecture, architecture_of
from headfuse.plan import HeadLayout


def head_dim(config: Any) -> int:
    """Channels of a head of a transformers config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def head_layout(config: Any, where: object = None) -> HeadLayout:
    """Read the heads of a supported model from its transformers config.

    Raises:
        UnsupportedModelError: for a family, an option or a rotary style that is not supported.
        CheckpointError: for head counts that do not divide.
    """
    arch = architecture_of(config.model_type, where)
    num_heads = config.num_attention_heads
    num_kv = (getattr(config, "num_key_value_heads", None) or num_heads) if arch.stock_gqa else num_heads
    channels = head_dim(config)
    for name, value in (
        ("num_hidden_layers", config.num_hidden_layers),
        ("hidden_size", config.hidden_size),
        ("num_attention_heads", num_heads),
        ("num_key_value_heads", num_kv),
        ("head_dim", channels),
    ):
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{name} is {value}", where=where, fix="restore the model's own config.json")
    if num_heads % num_kv:
        raise CheckpointError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv}",
            where=where,
            fix="restore the model's own config.json",
        )
    return HeadLayout(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv,
        head_dim=channels,
        rotary_dim=_rotary_dim(config, arch, channels, where),
    )


def _rotary_dim(config: Any, arch: Architecture, head_dim: int, where: object) -> int:
    if arch.rotary == "none":
        return 0
    factor = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor") or 1.0
    if factor != 1.0 and not arch.partial_rotary:
        raise UnsupportedModelError(
            f"keys that are rotated only in part are not supported for model_type {config.model_type!r}",
            where=where,
            fix="choose a model whose whole heads are rotated",
        )
    rotated = getattr(config, "rotary_dim", None) or int(head_dim * factor)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise CheckpointError(
            f"{rotated} rotated channels in a head of {head_dim}: the number must be even, above 0 and no larger",
            where=where,
            fix="restore the model's own config.json",
        )
    return rotated
