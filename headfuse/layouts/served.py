"""What runtimes do not run of a layout, and what they cache of a token where that is not what the layout keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from headfuse.choices import LAYOUT_FOR, ONE_HEAD
from headfuse.config.fuse import FuseConfig
from headfuse.errors import UnsupportedModelError
from headfuse.modeling.configuration_family import FAMILIES
from headfuse.modeling.configuration_headfuse import one_head_width
from headfuse.models.heads import head_layout
from headfuse.models.rope import layer_kind
from headfuse.plan import FusionPlan

ONE_WIDTH_IN_VLLM = ("qwen2", "qwen2_moe")
"""Families whose class in vLLM 0.32 has hidden_size / num_attention_heads channels a head, whatever its config says."""


def check_served(config: Any, runtime: str, settings: FuseConfig) -> None:
    """Refuse a model that a runtime does not run once it is fused so.

    Raises:
        UnsupportedModelError: naming the reason.
    """
    if runtime != "vllm":
        return
    family, layout, where, fix = FAMILIES.get(config.model_type), settings.layout, "--for", "choose --for transformers"
    reason = None
    if layout in ONE_HEAD[runtime]:
        reason = None if family is None else family.not_in_vllm
    elif layout == "gqa" and config.model_type in ONE_WIDTH_IN_VLLM:
        width = config.hidden_size // config.num_attention_heads
        if settings.budget.head_dim is not None:
            where, fix = "--head-dim", "leave it out, or choose --layout latent or --for transformers"
        if settings.budget.head_dim is not None or head_layout(config).head_dim != width:
            reason = f"its class there has heads of hidden_size / num_attention_heads = {width} channels only"
    if reason is not None:
        raise UnsupportedModelError(
            f"vLLM does not run model_type {config.model_type!r} in layout {layout}: {reason}", where=where, fix=fix
        )


def channels_in_runtimes(plan: FusionPlan, config: Any) -> dict[str, tuple[int, int]]:
    """Numbers of one token in the cache of each runtime that loads the layout, over all layers.

    Args:
        plan: of the fused model.
        config: of the source model.

    Returns:
        By the runtime's name, those of the source and those of the fused model.
    """
    source = [2 * plan.heads.num_key_value_heads * plan.heads.head_dim] * plan.heads.num_hidden_layers
    sides = list(zip(plan.key_channels, plan.value_channels, strict=True))
    found = {}
    for runtime, layouts in LAYOUT_FOR.items():
        if plan.layout not in layouts or (plan.sources and runtime != "transformers"):
            continue
        one_head = plan.layout in ONE_HEAD.get(runtime, ())
        fused = [2 * one_head_width(*side) if one_head else sum(side) for side in sides]
        if runtime == "vllm":
            found[runtime] = in_blocks(source, attention_kinds(config)), in_blocks(fused, attention_kinds(config))
        else:
            found[runtime] = sum(source), sum(fused)
    return found


def attention_kinds(config: Any) -> list[str]:
    """The kind of attention of each layer, as vLLM tells them apart: with the window of the config or without."""
    return [layer_kind(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]


def in_blocks(channels: Sequence[int], kinds: Sequence[str]) -> int:
    """Numbers of one token in vLLM's blocks, which its layers of all kinds share.

    Layers of one kind lie side by side, each with its own size. Of several kinds, a block holds the same number of
    layers of one kind and size, each as large as the largest: of a smaller layer with as many tokens more as fit, or
    padded where its size does not divide the largest (vLLM 0.32, `unify_kv_cache_spec_page_size` and
    `_get_kv_cache_groups_uniform_page_size` in v1/core/kv_cache_utils.py).

    Args:
        channels: numbers of one token in each layer.
        kinds: the kind of attention of each layer.
    """
    if len(set(kinds)) == 1:
        return sum(channels)
    largest, counts = max(channels), Counter(zip(channels, kinds, strict=True))
    fewest, most = min(counts.values()), max(counts.values())
    in_a_block = most if most < 1.5 * fewest else fewest
    places = {own: -(-count // in_a_block) * in_a_block for own, count in counts.items()}
    return sum((size if largest % size == 0 else largest) * places[size, kind] for size, kind in places)
