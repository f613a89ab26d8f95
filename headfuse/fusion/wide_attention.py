"""What a wide head caches, how its query heads read it, and how the source's heads are reconstructed from it.

Pure functions of tensors: the reference of the model code. A cached key holds the first channels of all slots, the
second ones, then the channels that are not rotated; source heads have their channels in the canonical order.
"""

from __future__ import annotations

import torch

from headfuse.fusion.key_channels import KeyChannels, planes
from headfuse.fusion.wide import KeyBasis, PlainBasis


def cached_keys(keys: torch.Tensor, basis: KeyBasis) -> torch.Tensor:
    """The keys `[..., T, w_k]` that a group caches, from its source keys `[..., g, T, d]`.

    The map commutes with RoPE: of keys before it, this is the cached key before each slot is rotated by its frequency.
    """
    turning, rest = _channels(basis, keys.shape[-1]).split(keys)
    source = turning[..., basis.frequency]  # [..., g, T, S]
    slots = torch.einsum("...gts,sg->...ts", source, basis.write.to(source))
    parts = [slots.real, slots.imag]
    if basis.plain is not None:
        parts.append(cached_values(rest, basis.plain))
    return torch.cat(parts, dim=-1)


def expanded_keys(cached: torch.Tensor, basis: KeyBasis, rotated: int) -> torch.Tensor:
    """Source keys `[..., g, T, d]`, `rotated` of their channels rotary, reconstructed from cached `[..., T, w_k]`."""
    count, channels = 2 * len(basis.frequency), KeyChannels(rotated, basis.still)
    slots, read = planes(cached[..., :count]), basis.read.T
    weighted = slots[..., None, :, :] * read[:, None, :].to(slots)  # [..., g, T, S]
    found = weighted.new_zeros(*weighted.shape[:-1], channels.planes).index_add(-1, basis.frequency, weighted)
    return channels.join(found, None if basis.plain is None else expanded_values(cached[..., count:], basis.plain))


def expanded_queries(queries: torch.Tensor, basis: KeyBasis, readers: torch.Tensor) -> torch.Tensor:
    """Queries `[..., n, T, d]` expanded to read cached keys, `[..., n, T, w_k]`: one gather and one factor per slot.

    Args:
        queries: of the group's query heads.
        basis: of the group's keys.
        readers: the place in the group of the source head that each query head reads, `[n]`.
    """
    turning, rest = _channels(basis, queries.shape[-1]).split(queries)
    source = turning[..., basis.frequency]  # [..., n, T, S]
    slots = source * basis.read.T.conj()[readers][:, None, :].to(source)
    parts = [slots.real, slots.imag]
    if basis.plain is not None:
        parts.append(rest @ basis.plain.read[readers].to(queries))
    return torch.cat(parts, dim=-1)


def cached_values(values: torch.Tensor, basis: PlainBasis) -> torch.Tensor:
    """The values `[..., T, r]` that a group caches, from its source values `[..., g, T, d]`."""
    return torch.einsum("...gtd,cgd->...tc", values, basis.write.to(values))


def expanded_values(cached: torch.Tensor, basis: PlainBasis) -> torch.Tensor:
    """Source values `[..., g, T, d]` reconstructed from cached ones `[..., T, r]`."""
    return torch.einsum("...tc,gdc->...gtd", cached, basis.read.to(cached))


def wide_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bases: tuple[KeyBasis, PlainBasis],
    readers: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Causal attention of a group's query heads over what the group caches: the reference of every implementation.

    Args:
        queries: after RoPE, `[B, n, T, d]`.
        keys: cached, after RoPE, `[B, T, w_k]`.
        values: cached, `[B, T, r]`.
        bases: of keys and values.
        readers: the place in the group of the source head that each query head reads, `[n]`.
        scaling: of the scores.

    Returns:
        Head outputs `[B, n, T, d]`, as the source's output projection reads them.
    """
    scores = expanded_queries(queries, bases[0], readers) @ keys[:, None].mT * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ values[:, None]) @ bases[1].read[readers].mT.to(values)


def _channels(basis: KeyBasis, head_dim: int) -> KeyChannels:
    """How source heads of `head_dim` channels divide in a basis."""
    plain = 0 if basis.plain is None else basis.plain.write.shape[2]
    return KeyChannels(head_dim - plain + 2 * basis.still, basis.still)
