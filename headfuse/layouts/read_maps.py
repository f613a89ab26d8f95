"""Read maps of wide heads folded into queries and output projection, so that a stock class computes them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from headfuse.layouts.slot_table import CONSTANT_SCALE
from headfuse.models.attention import AttentionWeights
from headfuse.plan import Groups, HeadLayout


def folded(weights: AttentionWeights, groups: Groups, slots: tuple[int, ...], heads: HeadLayout) -> AttentionWeights:
    """The layer as stock attention has it: every query head as wide as the key head of its group, W channels.

    A stock class divides scores by sqrt(W) where the source divides by sqrt(d), so queries are multiplied by sqrt(W /
    d). Families whose config holds the scale do not need this.

    Args:
        weights: with read maps; keys and values of all groups side by side, equally wide.
        groups: of source heads, of one size.
        slots: the frequency of each rotary plane of a head, the same in all groups.
        heads: the source's heads.

    Returns:
        `query [n_q, W, D]`, `key [G, W, D]`, `value [G, W, D]`, `output [D, n_q, W]`, heads in the source's order.
    """
    assert weights.key_read is not None
    assert weights.value_read is not None
    count, size, width = len(groups), len(groups[0]), weights.key.shape[1] // len(groups)
    key_read = torch.view_as_complex(weights.key_read.double().reshape(count, size, width // 2, 2).contiguous())
    value_read = weights.value_read.double().reshape(count, size, width, heads.head_dim)
    place = {head: (g, j) for g, group in enumerate(groups) for j, head in enumerate(group)}
    readers = [place[heads.source_head(query)] for query in range(heads.num_attention_heads)]
    group, member = (torch.tensor(column) for column in zip(*readers, strict=True))
    reads = key_read[group, member].conj()[..., None]  # [n_q, S, 1]
    grow = 1.0 if heads.model_type in CONSTANT_SCALE else math.sqrt(width / heads.head_dim)

    def expanded(query: torch.Tensor) -> torch.Tensor:
        halves = query.double().unflatten(1, (2, heads.head_dim // 2))[:, :, list(slots)]
        wide = torch.complex(halves[:, 0], halves[:, 1]) * reads * grow
        return torch.cat([wide.real, wide.imag], dim=1).to(query.dtype)

    bias = weights.query_bias
    output = torch.einsum("Dqd,qcd->Dqc", weights.output.double(), value_read[group, member])
    return replace(
        weights,
        query=expanded(weights.query),
        query_bias=None if bias is None else expanded(bias[..., None])[..., 0],
        key=weights.key.reshape(count, width, -1),
        key_bias=None if weights.key_bias is None else weights.key_bias.reshape(count, width),
        value=weights.value.reshape(count, width, -1),
        value_bias=None if weights.value_bias is None else weights.value_bias.reshape(count, width),
        output=output.to(weights.output.dtype),
        key_read=None,
        key_read_plain=None,
        value_read=None,
    )
