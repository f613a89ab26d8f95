"""FUSION_METHODS: one small file per method. Adding one is a pair of functions and a line in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from headfuse.fusion import align, mean, select, subspace
from headfuse.fusion.maps import HeadMaps, KeyMoments, ValueMoments, plane_matrix
from headfuse.plan import Groups

Maps = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FusionMethod:
    """A method as functions of one group's moments.

    `keys` gives complex factors `[g, F]`, `values` maps `[g, d, d]`, each for writing and for reading.
    """

    keys: Callable[[KeyMoments], Maps]
    values: Callable[[ValueMoments], Maps]
    refits_output: bool = False
    """Refit the layer's output projection jointly by least squares."""
    order_dependent: bool = False
    """The result depends on the order of the source heads."""
    lossless: bool = False
    """Exact on heads that are equal up to a function-preserving map."""

    def key_maps(self, groups: Groups, moments: KeyMoments) -> HeadMaps:
        """Write and read maps of all key heads of a layer; single heads keep the identity."""
        n, frequencies = moments.query_energy.shape
        maps = _identity(n, 2 * frequencies)
        for group in groups:
            if len(group) > 1:
                write, read = self.keys(moments.of(group))
                maps.write[list(group)], maps.read[list(group)] = plane_matrix(write), plane_matrix(read)
        return maps

    def value_maps(self, groups: Groups, moments: ValueMoments) -> HeadMaps:
        """Write and read maps of all value heads of a layer; single heads keep the identity."""
        maps = _identity(*moments.output_gram.shape[:2])
        for group in groups:
            if len(group) > 1:
                maps.write[list(group)], maps.read[list(group)] = self.values(moments.of(group))
        return maps


def _identity(n: int, d: int) -> HeadMaps:
    eye = torch.eye(d, dtype=torch.float64).repeat(n, 1, 1)
    return HeadMaps(eye.clone(), eye)


FUSION_METHODS: dict[str, FusionMethod] = {
    "mean": FusionMethod(mean.keys, mean.values),
    "first": FusionMethod(select.first_keys, select.first_values, order_dependent=True),
    "align": FusionMethod(align.keys, align.values),
    "subspace": FusionMethod(subspace.keys, subspace.values, refits_output=True, lossless=True),
}
