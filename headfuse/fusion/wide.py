"""Wide heads: one cached key and one cached value serve a whole group of source heads.

A group of g source heads, of d channels each, caches one key and one value. The key has S rotary slots, and plain
channels as well if part of the source's keys is not rotated. The value has r channels. Every query head of the group
reads all of both. One decomposition of the group's moments gives the maps for every width, and the energy lost at every
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headfuse.fusion.moments import KeyMoments, ValueMoments

FLOOR = 1e-12
"""Smallest weight of a head or channel, as a share of the largest. With this floor, full width equals the source even
for channels that the calibration text does not use.
"""
QUIET = 1e-6
"""Components with less than this share of the largest one's energy are cached at its scale, not amplified to 1."""


@dataclass(frozen=True)
class PlainBasis:
    """Components of values, or of the unrotated channels of keys, in falling order of energy.

    `write [c, g, d]` and `read [g, d, c]`: source_j ~ read_j sum_i write_i source_i; `energy [c]`: what the output (or
    the scores) lose without the component.
    """

    write: torch.Tensor
    read: torch.Tensor
    energy: torch.Tensor

    def narrowed(self, width: int) -> PlainBasis:
        """The first `width` components."""
        return PlainBasis(self.write[:width], self.read[..., :width], self.energy[:width])

    def over(self, sizes: torch.Tensor) -> PlainBasis:
        """The same maps with what is cached divided by `sizes [c]`."""
        return PlainBasis(self.write / sizes[:, None, None], self.read * sizes, self.energy)

    def lost(self) -> torch.Tensor:
        """Energy lost at each width from 0 up, `[c + 1]`."""
        return tail_sums(self.energy)


@dataclass(frozen=True)
class KeyBasis:
    """Components of the keys of a group, in falling order of their energy.

    `frequency [s]` of each slot; complex `write [s, g]` and `read [s, g]`: on the plane of its frequency
    key_j ~ sum_s read_sj slot_s with slot_s = sum_i write_si key_i; `energy [s]` in the scores. `plain`: of the
    channels that are not rotated. `still`: rotary planes, the slowest ones, that are among those (key_channels.py).
    """

    frequency: torch.Tensor
    write: torch.Tensor
    read: torch.Tensor
    energy: torch.Tensor
    plain: PlainBasis | None = None
    still: int = 0

    @property
    def width(self) -> int:
        """Cached channels."""
        return 2 * len(self.energy) + (0 if self.plain is None else len(self.plain.energy))

    def narrowed(self, width: int) -> KeyBasis:
        """The components that lose the least energy in `width` channels; slots in the order of their frequencies."""
        return self.carrying(self.slots(width), width)

    def slots(self, width: int) -> tuple[int, ...]:
        """The frequencies of those components of `width` channels that are rotated, in rising order."""
        count = self._best_slots(tail_sums(self.energy), self._plain_lost(), width)
        return tuple(sorted(self.frequency[:count].tolist()))

    def carrying(self, slots: Sequence[int], width: int) -> KeyBasis:
        """The best components for slots of these frequencies, in their order, and for the rest of `width`.

        Args:
            slots: a frequency each, at most g times the same.
            width: channels in all.
        """
        ranked = {f: iter((self.frequency == f).nonzero().flatten().tolist()) for f in set(slots)}
        index = torch.tensor([next(ranked[f]) for f in slots], dtype=torch.long)
        plain = None if self.plain is None else self.plain.narrowed(width - 2 * len(index))
        own = self.frequency[index], self.write[index], self.read[index], self.energy[index]
        return KeyBasis(*own, plain, self.still)

    def over(self, sizes: torch.Tensor) -> KeyBasis:
        """The same maps with what is cached divided by sizes: `[S]` of the slots, then of the plain channels."""
        slots, rest = sizes[: len(self.energy), None], sizes[len(self.energy) :]
        plain = None if self.plain is None else self.plain.over(rest)
        return replace(self, write=self.write / slots, read=self.read * slots, plain=plain)

    def lost(self) -> torch.Tensor:
        """Energy lost at each width from 0 up, `[width + 1]`; without plain channels, odd widths waste one."""
        rotated, plain = tail_sums(self.energy), self._plain_lost()
        slots = [self._best_slots(rotated, plain, width) for width in range(self.width + 1)]
        return torch.stack([rotated[s] + plain[max(0, w - 2 * s)] for w, s in enumerate(slots)])

    def _plain_lost(self) -> torch.Tensor:
        return torch.zeros(2, dtype=torch.float64) if self.plain is None else self.plain.lost()

    def _best_slots(self, rotated: torch.Tensor, plain: torch.Tensor, width: int) -> int:
        """Number of slots that loses least at this width, given the loss at each number of either kind."""
        slots = torch.arange(max(0, (width - len(plain) + 2) // 2), min(width // 2, len(self.energy)) + 1)
        return int(slots[(rotated[slots] + plain[width - 2 * slots]).argmin()])


def tail_sums(energy: torch.Tensor) -> torch.Tensor:
    """Sums of `energy [c]` without its first 0, 1, ... c numbers, `[c + 1]`."""
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


def key_basis(moments: KeyMoments) -> KeyBasis:
    """Decompose the keys of one group.

    The score error of a rotary plane, averaged over positions, is half of |q|^2 |k - k~|^2: the plane's two channels
    share it. So energies are halved, which makes slots comparable with unrotated channels.
    """
    weight = _floored(moments.query_energy.T).sqrt()  # [F, g]
    frequencies, g = weight.shape
    energy, vectors = torch.linalg.eigh(weight[:, :, None] * moments.gram * weight[:, None, :])
    # Of equal energies those of the first ranks come first, then those of the lowest planes.
    rank = torch.arange(g).flip(0).expand(frequencies, g)
    order = sorted(range(frequencies * g), key=lambda i: (-float(energy.flatten()[i]), int(rank.flatten()[i]), i // g))
    index = torch.tensor(order, dtype=torch.long)
    frequency = index // g
    u, a = vectors.mT.flatten(0, 1)[index], weight[frequency]  # [F g, g]
    write, read = u.conj() * a, u / a
    # As large as the source's keys: the weighted mean square of what heads read of a slot is 1.
    scale = ((read.abs() * a).square().sum(1) / a.square().sum(1)).sqrt()[:, None]
    plain = None if moments.tail is None else plain_basis(moments.tail)
    kept = energy.flatten()[index].clamp_min(0) / 2
    return KeyBasis(frequency, write * scale, read / scale, kept, plain, moments.still)


def plain_basis(moments: ValueMoments) -> PlainBasis:
    """Decompose the values of one group, or the channels of its keys that are not rotated.

    With N the weight of errors and C the covariance, the components are the eigenvectors of N^1/2 C N^1/2. Maps use
    N^1/2 and its inverse, never the inverse of C, so that all components together are the identity.
    """
    covariance, gram = moments.covariance, moments.output_gram
    g, d = gram.shape[:2]
    spectrum, axes = torch.linalg.eigh(gram)
    spectrum = _floored(spectrum)
    root, inverse = ((axes * spectrum.pow(power)[:, None]) @ axes.mT for power in (0.5, -0.5))  # [g, d, d]
    weighted = (root @ covariance.reshape(g, d, g * d)).view(g * d, g * d)
    weighted = (root @ weighted.mT.view(g, d, g * d)).view(g * d, g * d)  # N^1/2 C N^1/2
    energy, vectors = torch.linalg.eigh((weighted + weighted.mT) / 2)
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1).view(g, d, g * d)
    # Every component as large as a channel of a source head, but for those that are almost nothing.
    rms = (torch.einsum("iaia->", covariance) / (g * d)).sqrt()
    size = energy.clamp_min(QUIET * float(energy[0])).sqrt()
    scale = torch.where((rms > 0) & (size > 0), rms / size, torch.ones_like(size))
    write, read = root @ vectors * scale, inverse @ vectors / scale
    return PlainBasis(write.permute(2, 0, 1).contiguous(), read.contiguous(), energy)


def even_sizes(largest: torch.Tensor) -> torch.Tensor:
    """By what to divide cached channels so that all are as large: their largest numbers `[c]` over the geometric mean.

    A cache of few bits rounds the channels of a token in steps of one size. Let channel c be as large as k_c, and let
    its error cost q_c^2 in the output: divided by s_c, all lose max_c (k_c / s_c)^2 sum_c (s_c q_c)^2, which is least
    where s_c is k_c (the argument of SmoothQuant, arXiv 2211.10438). Without rounding the maps are the same.
    """
    floor = QUIET**0.5 * float(largest.max()) if largest.numel() else 0.0
    if not floor:
        return torch.ones_like(largest)
    sizes = largest.clamp_min(floor)
    return sizes / sizes.log().mean().exp()


def _floored(weights: torch.Tensor) -> torch.Tensor:
    """Non-negative weights with a floor relative to the largest; 1 where all are 0."""
    largest = weights.max() if weights.numel() else weights.new_ones(())
    return weights.clamp_min(FLOOR * float(largest)) if largest > 0 else torch.ones_like(weights)
