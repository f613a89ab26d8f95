"""One layer of attention that reads what earlier layers cache: its own channels, all read maps, the refitted output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headfuse.fusion.key_channels import KeyChannels
from headfuse.fusion.moments import KeyMoments, key_moments
from headfuse.fusion.reading import (
    Cached,
    conditional_keys,
    conditional_values,
    joint_values,
    read_keys,
    read_values,
)
from headfuse.fusion.refit import refit_to
from headfuse.fusion.wide import KeyBasis, PlainBasis, key_basis, plain_basis
from headfuse.fusion.wide_attention import cached_keys, cached_values
from headfuse.fusion.wide_layer import (
    MapRows,
    WideKeys,
    WideValues,
    fuse_wide_layer,
    reads_of,
    rows_of,
    turning_first,
    wide_maps,
    with_wide_heads,
)
from headfuse.models.attention import AttentionWeights
from headfuse.models.capture import AttentionCapture
from headfuse.plan import FusionPlan, Groups, HeadLayout, LayerPlan

Heads = Callable[[int], torch.Tensor]
"""Keys or values of the source's heads `[B, n, T, d]` in a capture, as the fused layer reconstructs them."""
Kept = dict[int, Cached]
"""What layers cache of the calibration windows."""


@dataclass(frozen=True)
class ReadingMaps:
    """The maps of a layer that reads: of its own channels, and from all channels to the source's heads."""

    own: tuple[WideKeys, WideValues]
    keys: Heads
    values: Heads
    reads: MapRows


def reading_maps(
    output: torch.Tensor, captures: Sequence[AttentionCapture], plan: FusionPlan, layer_idx: int, kept: Kept
) -> ReadingMaps:
    """The channels that a layer's sources do not explain, and read maps of its own and theirs; see `fuse_latent_layer`.

    `output [D, n_q, d]` is the source's.
    """
    layer, heads = plan.layers[layer_idx], plan.heads
    assert layer.value_widths is not None
    read = [
        Cached.together([kept[source] for source in each]) if each else None
        for each in (layer.key_sources, layer.value_sources)
    ]
    own, keys, key_reads = _keys(captures, heads, read[0], layer)
    own_values, values, value_reads = _values(captures, heads, read[1], (output, keys, layer.value_widths[0]))
    maps = WideKeys((own,), heads.rotary_dim), WideValues((own_values,))
    return ReadingMaps(maps, keys, values, {**key_reads, **value_reads})


def fuse_latent_layer(
    weights: AttentionWeights, captures: Sequence[AttentionCapture], plan: FusionPlan, layer_idx: int, kept: Kept
) -> AttentionWeights:
    """One layer of layout latent: untouched, with wide heads, or with wide heads beside what it reads.

    Args:
        weights: the source's.
        captures: the layer on the calibration windows.
        plan: of all layers.
        layer_idx: the layer.
        kept: what earlier layers cache of these windows, as far as this one or a later one reads it; brought up to
            date.

    Returns:
        `key [1, w_k, D]` and `value [1, w_v, D]` of what the layer caches, the read maps and the refitted `output`.
    """
    layer, own = plan.layers[layer_idx], None
    if layer.reads:
        maps = reading_maps(weights.output, captures, plan, layer_idx, kept)
        own = maps.own
        output = refit_to(
            weights.output, captures, lambda index: captures[index].attend(maps.keys(index), maps.values(index))
        )
        weights = with_wide_heads(weights, own, layer.key_groups, output, maps.reads)
        weights = turning_first(weights, KeyChannels(plan.heads.rotary_dim, layer.still_planes))
    elif not layer.untouched:
        weights, own = fuse_wide_layer(weights, captures, layer, plan.heads)
    if layer_idx in plan.sources:
        kept[layer_idx] = cached_states(captures, layer.key_groups, own, plan.heads.rotary_dim)
    later = {i for each in plan.layers[layer_idx + 1 :] for i in (*each.key_sources, *each.value_sources)}
    for done in kept.keys() - later:
        del kept[done]
    return weights


def latent_cache(
    output: torch.Tensor, captures: Sequence[AttentionCapture], plan: FusionPlan, layer_idx: int, kept: Kept
) -> Cached:
    """What a layer of layout latent caches of the calibration windows; `output [D, n_q, d]`, others as above."""
    layer, own = plan.layers[layer_idx], None
    if layer.reads:
        own = reading_maps(output, captures, plan, layer_idx, kept).own
    elif not layer.untouched:
        own = wide_maps(output, captures, layer, plan.heads)
    return cached_states(captures, layer.key_groups, own, plan.heads.rotary_dim)


def cached_states(
    captures: Sequence[AttentionCapture], groups: Groups, maps: tuple[WideKeys, WideValues] | None, rotated: int = 0
) -> Cached:
    """What a layer caches of the calibration windows, on the host; `maps` is None for an untouched layer.

    `rotated`: channels of its heads that RoPE rotates.
    """
    if maps is None:
        order, (_, n, _, d) = [group[0] for group in groups], captures[0].key.shape
        keys, values = ([getattr(c, side)[:, order].transpose(1, 2).flatten(2) for c in captures] for side in _SIDES)
        stock = tuple(range(rotated // 2))
        return Cached(_on_host(keys), _on_host(values), (stock,) * n, (d,) * n)
    places = [list(group) for group in groups]

    def cached(capture: AttentionCapture) -> tuple[torch.Tensor, torch.Tensor]:
        keys = [cached_keys(capture.key[:, at], basis) for at, basis in zip(places, maps[0].bases, strict=True)]
        values = [cached_values(capture.value[:, at], basis) for at, basis in zip(places, maps[1].bases, strict=True)]
        return torch.cat(keys, dim=-1), torch.cat(values, dim=-1)

    keys, values = (list(side) for side in zip(*map(cached, captures), strict=True))
    slots = tuple(tuple(basis.frequency.tolist()) for basis in maps[0].bases)
    return Cached(_on_host(keys), _on_host(values), slots, tuple(basis.width for basis in maps[0].bases))


_SIDES = ("key", "value")


def conditional_slots(
    captures: Sequence[AttentionCapture], heads: HeadLayout, source: Cached | None, width: int, still: int = 0
) -> tuple[int, ...]:
    """The frequencies of the slots that a key of this width has, beside what it reads; `still` as of `key_moments`."""
    return key_basis(_moments(captures, heads, source, still)).slots(width)


def _moments(captures: Sequence[AttentionCapture], heads: HeadLayout, source: Cached | None, still: int) -> KeyMoments:
    """Of the keys, or of what is left of them beside what the layer reads."""
    return key_moments(captures, heads, still) if source is None else conditional_keys(captures, heads, source, still)


def _keys(
    captures: Sequence[AttentionCapture], heads: HeadLayout, source: Cached | None, layer: LayerPlan
) -> tuple[KeyBasis, Heads, MapRows]:
    """The basis of the own keys, the keys that all channels give back, and the read maps."""
    assert layer.rotary_slots is not None
    assert layer.key_widths is not None
    moments, shape = _moments(captures, heads, source, layer.still_planes), (layer.rotary_slots[0], layer.key_widths[0])
    whole: Groups = (tuple(range(heads.num_key_value_heads)),)
    maps = WideKeys((key_basis(moments).carrying(*shape),), heads.rotary_dim).even(captures, whole)
    own = maps.bases[0]
    if source is None:
        reads = reads_of(maps.bases)
        return own, lambda index: maps.reconstruct(captures[index].key, whole), reads
    found = read_keys(captures, heads, source, own)
    slots = torch.view_as_real(found.read.T.contiguous()).flatten(0, 1)  # [n S, 2]
    plain = None if found.read_plain is None else found.read_plain.transpose(0, 1).flatten(0, 1)
    reads = {"key_read": rows_of([slots]), "key_read_plain": None if plain is None else rows_of([plain])}
    return own, lambda index: found.heads(index, captures[index]), reads


def _values(
    captures: Sequence[AttentionCapture],
    heads: HeadLayout,
    source: Cached | None,
    given: tuple[torch.Tensor, Heads, int],
) -> tuple[PlainBasis, Heads, MapRows]:
    """The same of values, given the output projection, the keys and the own width."""
    output, keys, width = given
    whole: Groups = (tuple(range(heads.num_key_value_heads)),)
    beside = [c.value.new_empty(*c.value.shape[::2], 0) for c in captures] if source is None else source.values
    joint = joint_values(captures, heads, beside, keys)
    basis = plain_basis(conditional_values(joint, output, heads)).narrowed(width)
    maps = WideValues((basis,)).even(captures, whole)
    own = maps.bases[0]
    if source is None:
        reads: MapRows = {"value_read": own.read.mT.flatten(0, 1)}
        return own, lambda index: maps.reconstruct(captures[index].value, whole), reads
    found = read_values(heads, source, own, joint)
    reads = {"value_read": found.read.transpose(0, 1).flatten(0, 1)}
    return own, lambda index: found.heads(index, captures[index]), reads


def _on_host(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(state.cpu() for state in states)
