"""One KV head per layer that holds all its keys, or all its values, side by side: how vLLM caches these models.

vLLM's backend for transformers' models gives a layer one number of KV heads of one size, for keys and values alike. A
query becomes as wide as that head, with zeros where the keys of others lie; its output is read where its values lie.
This file is shipped beside the weights, so it imports only torch, transformers and the standard library.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

RUNTIMES = ("vllm", "sglang")
"""Runtimes that put an attention with a KV cache of their own in the place of transformers', by its name there."""


def check_runtime(config: Any) -> None:
    """Refuse a runtime that would compute something else.

    Raises:
        NotImplementedError: for one that does not read the heads of single layers, for models whose layers read other
            layers' caches, and for families that vLLM's backend for transformers' models does not run.
    """
    runtime, way_out = config._attn_implementation, "fuse the source again with `headfuse fuse --layout gqa`"
    if runtime not in RUNTIMES:
        return
    if runtime != "vllm":
        raise NotImplementedError(
            f"layout {config.layout}: {runtime} gives every layer of this model the same KV heads; {way_out}"
        )
    if getattr(config, "last_reader", None) is not None:
        raise NotImplementedError(
            f"layout {config.layout}: vLLM gives no layer the cache of another one, which this model reads; fuse the "
            "source again without --cross-layer"
        )
    if config.family.not_in_vllm is not None:
        raise NotImplementedError(
            f"layout {config.layout}: vLLM's backend for transformers' models does not run "
            f"{config.source_config.model_type}: {config.family.not_in_vllm}; {way_out}"
        )


def check_attention(attention: Any) -> None:
    """Refuse an attention of vLLM that would compute something else than a layer's one head.

    Raises:
        NotImplementedError: naming what differs.
    """
    config, theirs = attention.config, getattr(attention, "attn", None)
    ours = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": 1,
        "head_size": config.one_head_widths[attention.layer_idx],
        "sliding_window": attention.sliding_window,
    }
    differing = [
        f"{name} {getattr(theirs, name, None)} for {wanted}"
        for name, wanted in ours.items()
        if getattr(theirs, name, None) != wanted
    ]
    if differing:
        raise NotImplementedError(
            f"layout {config.layout}, layer {attention.layer_idx}: vLLM's attention has {', '.join(differing)}; use "
            "vLLM 0.32 or newer without tensor parallelism (the one KV head of a layer cannot be split), or fuse the "
            "source again with `headfuse fuse --layout gqa`"
        )


def as_one_head(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values [b, s, n, d] as one head [b, 1, s, width], with zeros after the last."""
    joined = states.flatten(2)
    return nn.functional.pad(joined, (0, width - joined.shape[-1])).unsqueeze(1)


def in_places(states: torch.Tensor, places: torch.Tensor, width: int) -> torch.Tensor:
    """Queries [b, s, n, d] that each read one of the heads that lie side by side: [b, s, n, width], zeros elsewhere.

    Args:
        states: the queries.
        places: [n], the head that each reads.
        width: channels of all heads, and of what follows them.
    """
    d = states.shape[-1]
    slots = torch.arange(width // d, device=places.device)
    wide = torch.where((places[:, None] == slots)[..., None], states.unsqueeze(-2), 0).flatten(-2)
    return nn.functional.pad(wide, (0, width - wide.shape[-1]))


def from_places(states: torch.Tensor, places: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Of outputs [b, s, n, width] the channels of the head that each reads: [b, s, n, d]."""
    channels = places[:, None] * head_dim + torch.arange(head_dim, device=places.device)
    return states.gather(-1, channels.expand(*states.shape[:-1], head_dim))
