"""`latent`: one wide key and one wide value for a group of source heads, with the model code beside the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from headfuse.errors import UnsupportedModelError
from headfuse.models.attention import AttentionWeights
from headfuse.models.config import dtype_of
from headfuse.models.families import Architecture
from headfuse.plan import FusionPlan, HeadLayout, LayerPlan


def config(source: dict[str, Any], plan: FusionPlan) -> dict[str, Any]:
    """A headfuse config.json with the source's nested in it."""
    from headfuse.modeling.configuration_latent import AUTO_MAP

    keys, values, slots = zip(*(_widths(layer, plan.heads) for layer in plan.layers), strict=True)
    return {
        "model_type": "headfuse_latent",
        "architectures": ["LatentForCausalLM"],
        "auto_map": dict(AUTO_MAP),
        "dtype": dtype_of(source),
        "headfuse_format": 1,
        "source_config": _with_positions(source, plan.max_positions),
        "groups": [[list(group) for group in layer.key_groups] for layer in plan.layers],
        "key_widths": list(keys),
        "value_widths": list(values),
        "rotary_slots": list(slots),
        **_still_planes(plan),
        **_sources(plan),
    }


def _with_positions(source: dict[str, Any], positions: int | None) -> dict[str, Any]:
    """The source's config with the positions that the fused model is for."""
    return source if positions is None else {**source, "max_position_embeddings": positions}


def _still_planes(plan: FusionPlan) -> dict[str, Any]:
    """The planes that each layer does not turn; nothing where all layers turn all of them."""
    still = [layer.still_planes for layer in plan.layers]
    return {"still_planes": still} if any(still) else {}


def _sources(plan: FusionPlan) -> dict[str, Any]:
    """The layers that each layer reads; nothing where none reads another one."""
    if not plan.sources:
        return {}
    return {
        "key_sources": [list(layer.key_sources) for layer in plan.layers],
        "value_sources": [list(layer.value_sources) for layer in plan.layers],
    }


def check(config: Any) -> None:
    """Refuse a family whose values no linear map may mix, or whose attention modules cannot be replaced.

    Raises:
        UnsupportedModelError: naming the layout that works.
    """
    from headfuse.modeling.configuration_family import FAMILIES

    family, reason = FAMILIES.get(config.model_type), None
    if family is None:
        reason = f"it has no model code for model_type {config.model_type!r}"
    elif getattr(config, "clip_qkv", None) is not None:
        reason = f"model_type {config.model_type!r} clamps its keys and values (clip_qkv), which rules out mixing heads"
    if reason is not None:
        raise UnsupportedModelError(
            f"layout latent does not fit: {reason}", where="--layout", fix="choose --layout decoupled"
        )


def sized(weights: AttentionWeights, layer: LayerPlan, plan: FusionPlan) -> AttentionWeights:
    """Weights with the shapes that a layer of this plan is written with, but without data."""
    heads, normed = plan.heads, weights.key_norm is not None
    keys, values, slots = _widths(layer, heads)

    def wide(tensor: Any, width: int) -> Any:
        return None if tensor is None else tensor.new_empty((1, width, *tensor.shape[2:]))

    read = [_widths(plan.layers[source], heads) for source in layer.key_sources]
    read_values = sum(sum(_widths(plan.layers[source], heads)[1]) for source in layer.value_sources)

    def rows(widths: list[int], others: int, columns: int) -> torch.Tensor | None:
        count = sum(len(group) * width for group, width in zip(layer.key_groups, widths, strict=True))
        count += heads.num_key_value_heads * others
        return weights.key.new_empty((count, columns)) if count else None

    plain = [width - 2 * len(table) for width, table in zip(keys, slots, strict=True)]
    turning = heads.rotary_dim // 2 - layer.still_planes
    read_slots = sum(f < turning for _, _, tables in read for table in tables for f in table)
    read_plain = sum(map(sum, (widths for widths, _, _ in read))) - 2 * read_slots
    columns = heads.head_dim - 2 * turning
    if not normed:
        key, key_bias = wide(weights.key, sum(keys)), wide(weights.key_bias, sum(keys))
    else:  # whole, or none
        key = weights.key[: None if any(keys) else 0]
        key_bias = None if weights.key_bias is None else weights.key_bias[: len(key)]
    return replace(
        weights,
        key=key,
        key_bias=key_bias,
        key_write=rows([len(table) for table in slots], 0, 2) if normed else None,
        key_write_plain=rows(plain, 0, columns) if normed else None,
        value=wide(weights.value, sum(values)),
        value_bias=wide(weights.value_bias, sum(values)),
        key_read=rows([len(table) for table in slots], read_slots, 2),
        key_read_plain=rows(plain, read_plain, columns),
        value_read=rows(values, read_values, heads.head_dim),
    )


def arrange(weights: AttentionWeights, layer: LayerPlan, plan: FusionPlan) -> AttentionWeights:
    """Give an untouched layer groups of one head, with the identity as read map; leave other layers unchanged."""
    if not layer.untouched:
        return weights
    heads, order = plan.heads, [group[0] for group in layer.key_groups]
    count, planes, rest = heads.num_key_value_heads, heads.rotary_dim // 2, heads.head_dim - heads.rotary_dim
    slots = torch.tensor([1.0, 0.0]).repeat(count * planes, 1) if planes else None
    plain = torch.eye(rest).repeat(count, 1) if rest else None
    if weights.key_norm is None:
        key, key_bias = weights.key[order], None if weights.key_bias is None else weights.key_bias[order]
        weights = replace(weights, key=key, key_bias=key_bias)
    else:
        weights = replace(weights, key_write=slots, key_write_plain=plain)
    return replace(
        weights,
        value=weights.value[order],
        value_bias=None if weights.value_bias is None else weights.value_bias[order],
        key_read=slots,
        key_read_plain=plain,
        value_read=torch.eye(heads.head_dim).repeat(count, 1),
    )


def stored(arch: Architecture) -> Architecture:
    """Separate projections, and channels in the canonical order, whatever the source's class has."""
    return arch.decoupled()


def _widths(layer: LayerPlan, heads: HeadLayout) -> tuple[list[int], list[int], list[list[int]]]:
    """Widths of keys and of values and the rotary slots of each group; those of a source head where a plan has none."""
    if layer.key_widths is None or layer.value_widths is None or layer.rotary_slots is None:
        count, stock = len(layer.key_groups), list(range(heads.rotary_dim // 2))
        return [heads.head_dim] * count, [heads.head_dim] * count, [list(stock) for _ in range(count)]
    return list(layer.key_widths), list(layer.value_widths), [list(table) for table in layer.rotary_slots]
