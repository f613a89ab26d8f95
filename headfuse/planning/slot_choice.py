"""The frequency of each rotary slot in a stock model whose heads have another width: one table for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headfuse.fusion.moments import KeyMoments
from headfuse.fusion.wide import key_basis
from headfuse.plan import Groups


def slot_energy(moments: KeyMoments, groups: Groups) -> torch.Tensor:
    """Share of a layer's key energy that the r-th component of each plane carries, `[F, largest group]`, over groups.

    Args:
        moments: of the keys of one layer.
        groups: of source heads; each has a key head of its own.
    """
    planes, ranks = moments.query_energy.shape[1], max(map(len, groups))
    energy = torch.zeros(planes, ranks, dtype=torch.float64)
    for group in groups:
        basis, seen = key_basis(moments.of(group)), [0] * planes
        for plane, value in zip(basis.frequency.tolist(), basis.energy.tolist(), strict=True):
            energy[plane, seen[plane]] += value
            seen[plane] += 1
    return energy / energy.sum().clamp_min(1e-300)


def slot_table(energy: Sequence[torch.Tensor], slots: int) -> tuple[int, ...]:
    """The planes of one table, in rising order.

    Slots are divided evenly among the planes. The remainder goes to the components that carry the most energy, on
    average over the layers. A table chosen by energy alone drops the fast planes, which carry little energy but encode
    the order of the tokens (docs/experiments.md).

    Args:
        energy: of each layer, from `slot_energy`.
        slots: of a head; half its width.
    """
    mean = torch.stack(list(energy)).mean(0)  # [F, ranks]
    planes = len(mean)
    each, rest = divmod(slots, planes)
    extra = mean[:, each].argsort(descending=True, stable=True)[:rest].tolist() if rest else []
    return tuple(sorted([*range(planes)] * each + extra))
