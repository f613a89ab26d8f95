"""One layer of attention with wide heads: keys, values under the wide keys' attention, the refit of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headfuse.fusion.key_channels import KeyChannels
from headfuse.fusion.moments import key_moments, value_moments
from headfuse.fusion.refit import refit_output
from headfuse.fusion.wide import KeyBasis, PlainBasis, even_sizes, key_basis, plain_basis
from headfuse.fusion.wide_attention import cached_keys, cached_values, expanded_values
from headfuse.models.attention import CHANNELWISE, AttentionWeights
from headfuse.models.capture import AttentionCapture
from headfuse.plan import Groups, HeadLayout, LayerPlan

MapRows = dict[str, torch.Tensor | None]
"""Read maps, or write maps, by the names of the model code."""


@dataclass(frozen=True)
class WideKeys:
    """Reconstructs a layer's source keys from the wide keys of its groups: one map `[g, g]` per rotary plane."""

    bases: tuple[KeyBasis, ...]
    rotated: int
    """Channels of a source key that RoPE rotates; the first ones."""

    def cached(self, heads: torch.Tensor, groups: Groups) -> torch.Tensor:
        """The cached keys of all groups side by side, `[T, w_k]`, from source keys `[n, T, d]`."""
        own = zip(self.bases, groups, strict=True)
        return torch.cat([cached_keys(heads[list(group)], basis) for basis, group in own], dim=-1)

    def even(self, captures: Sequence[AttentionCapture], groups: Groups) -> WideKeys:
        """The same keys with slots and plain channels of one size in what the captures cache."""
        bases = []
        for basis, group in zip(self.bases, groups, strict=True):
            largest, count = _largest([c.key[:, list(group)] for c in captures], basis), len(basis.energy)
            pairs = torch.maximum(largest[:count], largest[count : 2 * count])  # a slot turns: one size for both
            bases.append(basis.over(even_sizes(torch.cat([pairs, largest[2 * count :]]))))
        return WideKeys(tuple(bases), self.rotated)

    def reconstruct(self, heads: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Replace keys `[..., n, T, d]` by their reconstruction from the wide keys."""
        result = heads.clone()
        for basis, group in zip(self.bases, groups, strict=True):
            own = heads[..., list(group), :, :]
            channels = KeyChannels(self.rotated, basis.still)
            source, rest = channels.split(own)
            product = self._product(basis, channels.planes)
            found = torch.einsum("fji,...itf->...jtf", product.to(source), source)
            plain = None if basis.plain is None else expanded_values(cached_values(rest, basis.plain), basis.plain)
            result[..., list(group), :, :] = channels.join(found, plain)
        return result

    def _product(self, basis: KeyBasis, planes: int) -> torch.Tensor:
        """`[F, g, g]`: key_j on a plane is the sum of product_ji key_i."""
        size = basis.read.shape[1]
        none = basis.read.new_zeros(planes, size, size)
        return none.index_add(0, basis.frequency, basis.read[:, :, None] * basis.write[:, None, :])


@dataclass(frozen=True)
class WideValues:
    """Reconstructs a layer's source values from the wide values of its groups."""

    bases: tuple[PlainBasis, ...]

    def cached(self, heads: torch.Tensor, groups: Groups) -> torch.Tensor:
        """The cached values of all groups side by side, `[T, w_v]`, from source values `[n, T, d]`."""
        own = zip(self.bases, groups, strict=True)
        return torch.cat([cached_values(heads[list(group)], basis) for basis, group in own], dim=-1)

    def even(self, captures: Sequence[AttentionCapture], groups: Groups) -> WideValues:
        """The same values with channels of one size in what the captures cache."""
        own = zip(self.bases, groups, strict=True)
        largest = ((basis, _largest([c.value[:, list(group)] for c in captures], basis)) for basis, group in own)
        return WideValues(tuple(basis.over(even_sizes(sizes)) for basis, sizes in largest))

    def reconstruct(self, heads: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Replace values `[..., n, T, d]` by their reconstruction from the wide values."""
        result = heads.clone()
        for basis, group in zip(self.bases, groups, strict=True):
            own = heads[..., list(group), :, :]
            result[..., list(group), :, :] = expanded_values(cached_values(own, basis), basis)
        return result


def fuse_wide_layer(
    weights: AttentionWeights, captures: Sequence[AttentionCapture], layer: LayerPlan, heads: HeadLayout
) -> tuple[AttentionWeights, tuple[WideKeys, WideValues]]:
    """Give one layer wide heads: read maps are stored beside the projections.

    The query projection is the source's, with the channels of turning planes first (key_channels.py).

    Args:
        weights: the source's.
        captures: the layer on the calibration windows.
        layer: its groups, their widths and slots; not an untouched one.
        heads: the source's heads.

    Returns:
        `key [1, w_k, D]` and `value [1, w_v, D]` of all groups side by side, the read maps, and the refitted `output`;
        and the maps of what it caches. Behind a norm the source's `key` and write maps.
    """
    groups, (keys, values) = layer.key_groups, wide_maps(weights.output, captures, layer, heads)
    output = refit_output(weights.output, captures, {"key": (keys, groups), "value": (values, groups)})
    reads = {**reads_of(keys.bases), "value_read": torch.cat([basis.read.mT.flatten(0, 1) for basis in values.bases])}
    fused = with_wide_heads(weights, (keys, values), groups, output, reads)
    return turning_first(fused, KeyChannels(heads.rotary_dim, layer.still_planes)), (keys, values)


def wide_maps(
    output: torch.Tensor, captures: Sequence[AttentionCapture], layer: LayerPlan, heads: HeadLayout
) -> tuple[WideKeys, WideValues]:
    """The maps of what a layer caches; arguments as of `fuse_wide_layer`, `output [D, n_q, d]`."""
    groups = layer.key_groups
    assert layer.key_widths is not None
    assert layer.value_widths is not None
    assert layer.rotary_slots is not None
    moments = key_moments(captures, heads, layer.still_planes)
    tables = zip(groups, layer.rotary_slots, layer.key_widths, strict=True)
    keys = WideKeys(
        tuple(key_basis(moments.of(group)).carrying(slots, width) for group, slots, width in tables), heads.rotary_dim
    )
    averaged = value_moments(captures, output, heads, (keys, groups))
    widths = zip(groups, layer.value_widths, strict=True)
    values = WideValues(tuple(plain_basis(averaged.of(group)).narrowed(width) for group, width in widths))
    return keys.even(captures, groups), values.even(captures, groups)


def turning_first(weights: AttentionWeights, channels: KeyChannels) -> AttentionWeights:
    """Queries with the channels of turning planes first, as the model code rotates them; whole keys and norms, too."""
    if not channels.still:
        return weights
    moved = ("query", "query_bias") if weights.key_norm is None else CHANNELWISE
    return weights.reordered(channels.order(weights.query.shape[1]), moved)


def _largest(states: Sequence[torch.Tensor], basis: KeyBasis | PlainBasis) -> torch.Tensor:
    """The largest number in each channel that source states `[B, g, T, d]` cache, `[w]`; numbers as in the basis."""
    found = [
        (cached_keys(part, basis) if isinstance(basis, KeyBasis) else cached_values(part, basis)) for part in states
    ]
    largest = torch.stack([part.abs().amax(dim=(0, 1)) for part in found]).amax(dim=0)
    return largest.to(basis.energy.device).to(basis.energy.dtype)  # the device first: not all have float64


def with_wide_heads(
    weights: AttentionWeights,
    maps: tuple[WideKeys, WideValues],
    groups: Groups,
    output: torch.Tensor,
    reads: MapRows,
) -> AttentionWeights:
    """A source layer's weights with the projections of what it caches, read maps and the refitted output.

    Behind a norm the keys stay whole, and their write maps are stored: no projection gives a mix of normed keys.
    """
    key, key_bias, writes = weights.key, weights.key_bias, MapRows()
    if weights.key_norm is None:
        key, key_bias = _written(key, key_bias, maps[0], groups)
    else:
        writes = writes_of(maps[0].bases)
        if not any(basis.width for basis in maps[0].bases):
            key, key_bias = key[:0], None if key_bias is None else key_bias[:0]
    value, value_bias = _written(weights.value, weights.value_bias, maps[1], groups)
    return replace(
        weights, key=key, key_bias=key_bias, value=value, value_bias=value_bias, output=output,
        **writes, **reads,  # type: ignore[arg-type]
    )  # fmt: skip


def _written(
    weight: torch.Tensor, bias: torch.Tensor | None, maps: WideKeys | WideValues, groups: Groups
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Projections `[1, w, D]` and biases `[1, w]` of what is cached, from those of the source's heads."""
    wide = maps.cached(weight.double().mT, groups).T[None]
    return wide, None if bias is None else maps.cached(bias.double()[:, None], groups)


def writes_of(bases: Sequence[KeyBasis]) -> MapRows:
    """The write maps of keys as the model code has them, with the rows of the read maps."""
    slots = [torch.view_as_real(basis.write.T.contiguous()).flatten(0, 1) for basis in bases]  # [g S, 2]
    plain = [basis.plain.write.transpose(0, 1).flatten(0, 1) for basis in bases if basis.plain is not None]
    return {"key_write": rows_of(slots), "key_write_plain": rows_of(plain)}


def reads_of(bases: Sequence[KeyBasis]) -> MapRows:
    """The read maps of keys as the model code has them: rows in the order of (group, source head, channel)."""
    slots = [torch.view_as_real(basis.read.T.contiguous()).flatten(0, 1) for basis in bases]  # [g S, 2]
    plain = [basis.plain.read.mT.flatten(0, 1) for basis in bases if basis.plain is not None]  # [g c, d - 2 p]
    return {"key_read": rows_of(slots), "key_read_plain": rows_of(plain)}


def rows_of(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """The rows of all parts; None where there are none, which no file has a place for."""
    rows = torch.cat(parts) if parts else torch.empty(0)
    return rows if len(rows) else None
