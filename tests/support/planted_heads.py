"""Heads of a tiny model that are edited, or made equal up to what fuses without loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from headfuse.models.attention import AttentionWeights
from headfuse.models.families import ARCHITECTURES, Architecture
from headfuse.models.heads import head_layout
from headfuse.plan import HeadLayout


def edit_heads(folder: Path, change: Any) -> None:
    """Load a model, call `change(attention module)` on every layer, and save it again."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            change(layer.self_attn)
    model.save_pretrained(folder)


def by_head(projection: torch.nn.Linear, d: int = 8) -> list[torch.Tensor]:
    """Views of a projection's weight `[n, d, D]` and, where there is one, its bias `[n, d, 1]`."""
    views = [projection.weight.data.view(-1, d, projection.weight.shape[1])]
    return views if projection.bias is None else [*views, projection.bias.data.view(-1, d, 1)]


Groups = Sequence[Sequence[int]]


def edit_weights(folder: Path, change: Callable[[AttentionWeights, Architecture, HeadLayout], None]) -> None:
    """Call `change(weights, architecture, heads)` on every layer of a checkpoint of any family, and save it again."""
    config, file = AutoConfig.from_pretrained(folder), folder / "model.safetensors"
    arch, heads, tensors = ARCHITECTURES[config.model_type], head_layout(config), load_file(file)
    for layer_idx in range(heads.num_hidden_layers):
        prefix = arch.layer_prefix(layer_idx) + "."
        layer = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        weights = AttentionWeights.of_layer(layer, arch, heads)
        change(weights, arch, heads)
        for name, tensor in weights.in_layer(layer, arch, heads).items():
            tensors[prefix + name] = tensor.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def plant(folder: Path, key_groups: Groups, value_groups: Groups | None = None) -> None:
    """Make the heads of each group equal up to what fuses without loss.

    Keys: a phase and scale per rotary plane, any invertible map of what is not rotated, nothing behind a norm; values:
    any invertible map.
    """
    torch.manual_seed(3)

    def matrix(size: int) -> torch.Tensor:
        return torch.eye(size) + 0.3 * torch.randn(size, size)

    def key_map(rotated: int, d: int) -> torch.Tensor:
        plane = torch.polar(torch.rand(rotated // 2) + 0.5, torch.rand(rotated // 2) * 6)
        c, s = torch.diag(plane.real), torch.diag(plane.imag)
        return torch.block_diag(torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)]), matrix(d - rotated))

    def change(weights: AttentionWeights, arch: Architecture, heads: HeadLayout) -> None:
        d, normed = heads.head_dim, weights.key_norm is not None
        for first, *others in key_groups:
            for other in others:
                change_of_basis = torch.eye(d) if normed else key_map(heads.rotary_dim, d)
                weights.key[other] = change_of_basis @ weights.key[first]
                if weights.key_bias is not None:
                    weights.key_bias[other] = change_of_basis @ weights.key_bias[first]
                if weights.key_norm is not None and len(weights.key_norm) > 1:
                    weights.key_norm[other] = weights.key_norm[first]
        for first, *others in key_groups if value_groups is None else value_groups:
            for other in others:
                change_of_basis = matrix(d)
                weights.value[other] = change_of_basis @ weights.value[first]
                if weights.value_bias is not None:
                    weights.value_bias[other] = change_of_basis @ weights.value_bias[first]

    edit_weights(folder, change)
