"""FUSION_METHODS: one small file per method. Adding one is a pair of functions and a line in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from headfuse.fusion.maps import HeadMaps, plane_matrix, slot_matrix
from headfuse.fusion.methods import align, mean, subspace
from headfuse.fusion.methods import first as select
from headfuse.fusion.moments import KeyMoments, ValueMoments
from headfuse.plan import Groups

Maps = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FusionMethod:
    """A fusion method: functions of one group's moments.

    `keys` returns complex write and read factors `[g, slots]`. `values` returns write and read maps `[g, d, d]`, and
    also serves the unrotated channels of keys. `slots`, where the method has it, chooses the frequency of each slot of
    a fused key head.
    """

    keys: Callable[[KeyMoments, tuple[int, ...]], Maps]
    values: Callable[[ValueMoments], Maps]
    slots: Callable[[KeyMoments], tuple[int, ...]] | None = None
    refits_output: bool = False
    """Refit the layer's output projection jointly by least squares."""
    order_dependent: bool = False
    """The result depends on the order of the source heads."""
    normed_keys: Callable[[KeyMoments, tuple[int, ...]], Maps] = mean.keys
    """Replaces `keys` where keys have a norm: real write factors, and read factors of 1."""
    lossless: bool = False
    """Loses nothing on heads that are equal up to a function-preserving map."""
    wide: bool = False
    """Can also fuse a group into one head of any width (wide_layer.py)."""
    trained: bool = False
    """Trains the whole model, starting from these maps (headfuse/dha)."""

    def rotary_slots(self, groups: Groups, moments: KeyMoments) -> Groups | None:
        """The frequency of each slot of each fused key head; None if all heads keep the stock order."""
        stock = tuple(range(moments.query_energy.shape[1]))
        choose = self.slots
        if choose is None or moments.normed:
            return None
        slots = tuple(choose(moments.of(group)) if len(group) > 1 else stock for group in groups)
        return None if all(head == stock for head in slots) else slots

    def key_maps(self, groups: Groups, moments: KeyMoments, slots: Groups | None = None) -> HeadMaps:
        """Write and read maps of all key heads of a layer; single heads keep the identity."""
        n, frequencies = moments.query_energy.shape
        tail = 0 if moments.tail is None else moments.tail.output_gram.shape[1]
        maps, stock = _identity(n, 2 * frequencies + tail), tuple(range(frequencies))
        rotated, rest = slice(2 * frequencies), slice(2 * frequencies, None)
        for i, group in enumerate(groups):
            if len(group) == 1:
                continue
            own, index = moments.of(group), list(group)
            if frequencies:
                carried = stock if slots is None else slots[i]
                write, read = (self.normed_keys if own.normed else self.keys)(own, carried)
                select = slot_matrix(carried)
                maps.write[index, rotated, rotated] = plane_matrix(write) @ select
                maps.read[index, rotated, rotated] = select.T @ plane_matrix(read)
            if own.tail is not None and own.normed:
                every = replace(own, query_energy=own.tail_energy)
                write, read = self.normed_keys(every, tuple(range(tail)))
                maps.write[index, rest, rest], maps.read[index, rest, rest] = (
                    torch.diag_embed(factors.real) for factors in (write, read)
                )
            elif own.tail is not None:
                maps.write[index, rest, rest], maps.read[index, rest, rest] = self.values(own.tail)
        return maps

    def value_maps(
        self, groups: Groups, moments: ValueMoments, known: dict[tuple[int, ...], Maps] | None = None
    ) -> HeadMaps:
        """Write and read maps of all value heads of a layer; single heads keep the identity.

        `known` caches the maps of every group between calls with the same moments.
        """
        maps, known = _identity(*moments.output_gram.shape[:2]), {} if known is None else known
        for group in groups:
            if len(group) > 1:
                if group not in known:
                    known[group] = self.values(moments.of(group))
                maps.write[list(group)], maps.read[list(group)] = known[group]
        return maps


def _identity(n: int, d: int) -> HeadMaps:
    eye = torch.eye(d, dtype=torch.float64).repeat(n, 1, 1)
    return HeadMaps(eye.clone(), eye)


FUSION_METHODS: dict[str, FusionMethod] = {
    "mean": FusionMethod(mean.keys, mean.values),
    "first": FusionMethod(select.first_keys, select.first_values, normed_keys=select.first_keys, order_dependent=True),
    "align": FusionMethod(align.keys, align.values),
    "subspace": FusionMethod(
        subspace.keys,
        subspace.values,
        subspace.slots,
        refits_output=True,
        normed_keys=subspace.normed_keys,
        lossless=True,
        wide=True,
    ),
    "dha": FusionMethod(mean.keys, mean.values, trained=True),
}
