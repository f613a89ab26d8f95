"""A layer that reads what earlier layers cache: what it caches itself, and the read maps of all of it.

Its own channels are the principal components of what the earlier layers' caches do not explain: those of the
conditional second moments, given the cached channels. Read maps are the regression of the layer's keys and values on
all channels that it reads; of keys on the channels that turn with the same frequency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from headfuse.fusion.key_channels import KeyChannels, planes
from headfuse.fusion.moments import (
    KeyMoments,
    ValueMoments,
    about_mean,
    averaged,
    key_moments,
    output_gram,
)
from headfuse.fusion.wide import KeyBasis, PlainBasis
from headfuse.fusion.wide_attention import cached_keys, cached_values
from headfuse.models.capture import AttentionCapture
from headfuse.models.placement import widened
from headfuse.plan import Groups, HeadLayout

CUT = 1e-10
"""Smallest eigenvalue of the cached channels' moments that is inverted, relative to the largest."""
Captures = Sequence[AttentionCapture]


@dataclass(frozen=True)
class Cached:
    """What a layer caches of the calibration windows: keys `[B, T, w_k]` and values `[B, T, w_v]` of each capture.

    `slots` and `widths` of the cached key of each group, as in the plan.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    slots: Groups
    widths: tuple[int, ...]

    def split(self, index: int, like: torch.Tensor, turning: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A capture's cached keys as complex slots `[B, T, S]` and channels that are not rotated `[B, T, c]`.

        Slots of planes from `turning` on are two channels each: the reader does not turn them.
        """
        slots, plain = list[torch.Tensor](), list[torch.Tensor]()
        for part, table in zip(self.keys[index].to(like).split(self.widths, dim=-1), self.slots, strict=True):
            own, rest = planes(part[..., : 2 * len(table)]), part[..., 2 * len(table) :]
            turn, stand = ([i for i, f in enumerate(table) if (f < turning) == turns] for turns in (True, False))
            slots.append(own[..., turn])
            plain += [own[..., stand].real, own[..., stand].imag, rest]
        return torch.cat(slots, dim=-1), torch.cat(plain, dim=-1)

    @classmethod
    def together(cls, layers: Sequence[Cached]) -> Cached:
        """What several layers cache, side by side."""
        keys, values = zip(*((layer.keys, layer.values) for layer in layers), strict=True)
        return cls(
            tuple(torch.cat(parts, dim=-1) for parts in zip(*keys, strict=True)),
            tuple(torch.cat(parts, dim=-1) for parts in zip(*values, strict=True)),
            tuple(table for layer in layers for table in layer.slots),
            tuple(width for layer in layers for width in layer.widths),
        )

    def frequencies(self, turning: int) -> list[int]:
        """Of all slots, less those of planes from `turning` on."""
        return [frequency for table in self.slots for frequency in table if frequency < turning]


@dataclass(frozen=True)
class ReadKeys:
    """Keys of the source's heads from own and read channels.

    `own`: what the layer caches; complex `read [S, n]` of all slots, own ones first, with their `frequency [S]`;
    `read_plain [c, n, d - 2 p]` of all channels that are not rotated; `channels`: of a source key.
    """

    own: KeyBasis
    source: Cached
    frequency: torch.Tensor
    read: torch.Tensor
    read_plain: torch.Tensor | None
    channels: KeyChannels

    def heads(self, index: int, capture: AttentionCapture) -> torch.Tensor:
        """Source keys `[B, n, T, d]` of a capture."""
        slots, plain = _both(self.own, self.source, index, capture, self.channels)
        weighted = slots[:, None] * self.read.T[None, :, None].to(slots)  # [B, n, T, S]
        found = weighted.new_zeros(*weighted.shape[:-1], self.channels.planes).index_add(
            -1, self.frequency.to(weighted.device), weighted
        )
        read = self.read_plain
        return self.channels.join(found, None if read is None else torch.einsum("btc,cnd->bntd", plain, read.to(plain)))


@dataclass(frozen=True)
class ReadValues:
    """Values of the source's heads from own channels and read ones: `read [w, n, d]`, own channels first."""

    own: PlainBasis
    source: Cached
    read: torch.Tensor

    def heads(self, index: int, capture: AttentionCapture) -> torch.Tensor:
        """Source values `[B, n, T, d]` of a capture."""
        own, source = cached_values(capture.value, self.own), self.source.values[index].to(capture.value)
        return torch.einsum("btc,cnd->bntd", torch.cat([own, source], dim=-1), self.read.to(own))


def conditional_keys(captures: Captures, heads: HeadLayout, source: Cached, still: int) -> KeyMoments:
    """The moments of a layer's keys that its source's cached keys do not explain; `still` as of `key_moments`."""
    moments, channels = key_moments(captures, heads, still), KeyChannels(heads.rotary_dim, still)
    slots = [source.split(i, c.key, channels.planes)[0] for i, c in enumerate(captures)]
    frequency = torch.tensor(source.frequencies(channels.planes), dtype=torch.long)
    gram, cross = _slot_moments(captures, slots, frequency, channels)
    explained = cross.conj()[:, :, None] * (_inverse(gram) @ cross)[:, None, :]  # [S, n, n]
    left = moments.gram.index_add(0, frequency.to(moments.gram.device), -explained)
    return replace(moments, gram=(left + left.mH) / 2, tail=_conditional_tail(captures, channels, source, moments.tail))


def read_keys(captures: Captures, heads: HeadLayout, source: Cached, own: KeyBasis) -> ReadKeys:
    """The read maps of own and read keys together."""
    channels = KeyChannels(heads.rotary_dim, own.still)
    both = [_both(own, source, i, capture, channels) for i, capture in enumerate(captures)]
    frequency = torch.tensor([*own.frequency.tolist(), *source.frequencies(channels.planes)], dtype=torch.long)
    gram, cross = _slot_moments(captures, [slots for slots, _ in both], frequency, channels)
    read, plain = (_inverse(gram) @ cross).conj().resolve_conj(), None
    if 2 * channels.planes < heads.head_dim:
        tails = [channels.split(capture.key)[1].transpose(1, 2).flatten(2) for capture in captures]
        joint = _covariance(captures, [torch.cat([t, p], -1) for t, (_, p) in zip(tails, both, strict=True)])
        plain = _regression(joint, tails[0].shape[-1]).unflatten(1, (heads.num_key_value_heads, -1))
    return ReadKeys(own, source, frequency.to(read.device), read, plain, channels)


def conditional_values(joint: torch.Tensor, output: torch.Tensor, heads: HeadLayout) -> ValueMoments:
    """The moments of a layer's values that its source's cached values do not explain, given those of both."""
    n, d = heads.num_key_value_heads, heads.head_dim
    return ValueMoments(_left(joint, n * d).view(n, d, n, d), output_gram(output, heads))


def joint_values(
    captures: Captures, heads: HeadLayout, beside: Sequence[torch.Tensor], keys: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """Moments `[n d + r, n d + r]` of the heads' values and of others `[B, T, r]`, averaged by the attention."""
    values = [c.value.transpose(1, 2).flatten(2) for c in captures]
    states = [torch.cat([own, other.to(own)], dim=-1) for own, other in zip(values, beside, strict=True)]
    return averaged(captures, states.__getitem__, keys, heads.num_key_value_heads * heads.head_dim)


def read_values(heads: HeadLayout, source: Cached, own: PlainBasis, joint: torch.Tensor) -> ReadValues:
    """The read maps of own and read values together, from the moments of heads and read values."""
    n, size = heads.num_key_value_heads, heads.num_key_value_heads * heads.head_dim
    write = own.write.flatten(1).to(joint)  # [c, n d]: own channels are maps of the heads' values
    maps = torch.block_diag(torch.cat([torch.eye(size).to(joint), write]), torch.eye(len(joint) - size).to(joint))
    together = maps @ joint @ maps.T
    return ReadValues(own, source, _regression(together, size).unflatten(1, (n, -1)))


def _both(
    own: KeyBasis, source: Cached, index: int, capture: AttentionCapture, channels: KeyChannels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Own slots, then those of the source, and likewise the channels that are not rotated."""
    count, cached = 2 * len(own.energy), cached_keys(capture.key, own)
    slots, plain = source.split(index, capture.key, channels.planes)
    mine = planes(cached[..., :count]), cached[..., count:]
    return torch.cat([mine[0], slots], dim=-1), torch.cat([mine[1], plain], dim=-1)


def _slot_moments(
    captures: Captures, slots: Sequence[torch.Tensor], frequency: torch.Tensor, channels: KeyChannels
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[S, S]`: E[c conj c'] of slots of one frequency, 0 between others; `[S, n]`: E[c conj k] on the slot's plane.

    Both about the mean of the window, like the moments of the keys.
    """
    gram = cross = torch.zeros((), dtype=torch.complex128)
    tokens = 0.0
    for capture, part in zip(captures, slots, strict=True):
        c = about_mean(capture, widened(part))  # [B, T, S]
        k = about_mean(capture, widened(channels.split(capture.key)[0][..., frequency]))  # [B, n, T, S]
        rows = c.flatten(0, 1)  # [B T, S]
        gram = gram.to(c.device) + capture.weight * (rows.T @ rows.conj())
        cross = cross.to(c.device) + capture.weight * torch.einsum("bts,bnts->sn", c, k.conj())
        tokens += capture.weight * len(rows)
    alike = (frequency[:, None] == frequency).to(gram.device)
    return gram * alike / tokens, cross / tokens


def _conditional_tail(
    captures: Captures, channels: KeyChannels, source: Cached, tail: ValueMoments | None
) -> ValueMoments | None:
    """The same of the channels that are not rotated."""
    if tail is None:
        return None
    own = [channels.split(capture.key)[1].transpose(1, 2).flatten(2) for capture in captures]
    plain = [source.split(i, capture.key, channels.planes)[1] for i, capture in enumerate(captures)]
    joint = _covariance(captures, [torch.cat(pair, dim=-1) for pair in zip(own, plain, strict=True)])
    return ValueMoments(_left(joint, own[0].shape[-1]).view_as(tail.covariance), tail.output_gram)


def _covariance(captures: Captures, states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Covariance `[w, w]` of states `[B, T, w]` about the mean of their window, like the moments of the keys."""
    gram, tokens = torch.zeros((), dtype=torch.float64), 0.0
    for capture, part in zip(captures, states, strict=True):
        rows = about_mean(capture, widened(part)).flatten(0, 1)
        gram = gram.to(rows.device) + capture.weight * (rows.T @ rows)
        tokens += capture.weight * len(rows)
    return gram / tokens


def _left(joint: torch.Tensor, size: int) -> torch.Tensor:
    """What the channels from `size` on do not explain of the moments of those before them."""
    own, cross, others = joint[:size, :size], joint[size:, :size], joint[size:, size:]
    left = own - cross.T @ (_inverse(others) @ cross)
    return (left + left.T) / 2


def _regression(joint: torch.Tensor, size: int) -> torch.Tensor:
    """The map `[others, size]` from the channels from `size` on to those before them."""
    return _inverse(joint[size:, size:]) @ joint[size:, :size]


def _inverse(gram: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(gram, rtol=CUT, hermitian=True) if len(gram) else gram
