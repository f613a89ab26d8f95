"""Survey of one layer for wide heads: the energy lost at every width, and the maps whose cost is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headfuse.choices import Side
from headfuse.fusion.maps import Reconstruction
from headfuse.fusion.moments import KeyMoments, ValueMoments, key_moments, value_moments, with_still_planes
from headfuse.fusion.wide import KeyBasis, PlainBasis, key_basis, plain_basis
from headfuse.fusion.wide_layer import WideKeys, WideValues
from headfuse.models.capture import AttentionCapture
from headfuse.plan import Groups, HeadLayout, LayerPlan
from headfuse.planning.fused_variants import Fused
from headfuse.planning.slot_choice import slot_table
from headfuse.planning.survey import LayerSurvey, key_energy, key_pair_cost, value_energy, value_pair_cost
from headfuse.planning.widths import measured_widths


def survey_wide_layer(
    captures: Sequence[AttentionCapture],
    output: torch.Tensor,
    heads: HeadLayout,
    quantum: int,
    costs: bool,
    pairs: bool = False,
    slow: Sequence[float] = (),
) -> tuple[LayerSurvey, Fused]:
    """Measure one source layer: the rotary slots of every width, and what it loses.

    Args:
        captures: the layer on the calibration windows.
        output: output projection `[D, n_q, d]`.
        heads: the source's heads.
        quantum: channels of a step of the widths.
        costs: the allocator reads the measured costs of widths.
        pairs: measure what pairs of heads share, which decides nothing here.
        slow: the mean square of the angle on each of the slowest rotary planes (models/rope.py). At each width a layer
            turns all of them or none, whichever is expected to lose less.

    Returns:
        The survey, its counts in quanta, and the maps of those widths whose cost is to be measured.
    """
    widths = range(quantum, heads.num_key_value_heads * heads.head_dim + 1, quantum)
    keys, values = key_moments(captures, heads), value_moments(captures, output, heads, None)
    bases = WideBases.of(keys, values, captures, heads, slow)
    key, whole = bases.keys, bases.whole
    fused, lost = dict[tuple[Side, int], tuple[Reconstruction, Groups]](), dict[Side, list[float]]()
    if costs:
        lost = {"key": key.lost[list(widths)].tolist(), "value": bases.values.lost()[list(widths)].tolist()}
        for count in measured_widths(len(widths)):
            maps = bases.fused(widths[count - 1], widths[count - 1])
            fused["key", count], fused["value", count] = maps["key"], maps["value"]
    slots: list[Groups | None] = [(key.at(width).slots(width),) for width in widths]
    survey = LayerSurvey(
        key_pairs=key_pair_cost(keys, True).tolist() if pairs else [],
        value_pairs=value_pair_cost(values).tolist() if pairs else [],
        key_energy=key_energy(keys),
        value_energy=value_energy(values),
        key_groups=[whole] * len(widths),
        key_slots=slots,
        value_groups=[whole] * len(widths),
        shared_groups={},
        lost=lost,
        key_still=[key.at(width).still for width in widths],
    )
    return survey, fused


@dataclass(frozen=True)
class _KeyBases:
    """The keys of a layer with all planes turning, and with the slow ones still; `lost [c + 1]` of the better one.

    A still plane that should turn by an angle x has the mean square error x^2 |q|^2 |k|^2 / 2 in the scores. This drift
    is counted as lost, so a layer whose heads fuse without loss turns all planes, and is exact for texts of any length.
    """

    turning: KeyBasis
    still: KeyBasis | None
    lost: torch.Tensor
    stands: torch.Tensor

    @classmethod
    def of(
        cls, moments: KeyMoments, captures: Sequence[AttentionCapture], heads: HeadLayout, slow: Sequence[float]
    ) -> _KeyBases:
        turning = key_basis(moments)
        lost = turning.lost()
        if not slow:
            return cls(turning, None, lost, torch.zeros(len(lost), dtype=torch.bool))
        still = key_basis(with_still_planes(moments, captures, heads, len(slow)))
        drift = (moments.energy[:, -len(slow) :] * moments.energy.new_tensor(slow)).sum() / 2
        other = still.lost() + drift.to(lost)
        return cls(turning, still, torch.minimum(lost, other), other < lost)

    def at(self, width: int) -> KeyBasis:
        """The basis that loses less in `width` channels."""
        return self.turning if self.still is None or not self.stands[width] else self.still


@dataclass(frozen=True)
class WideBases:
    """What one wide head caches of all heads of a layer, at every width of its keys and of its values."""

    keys: _KeyBases
    values: PlainBasis
    heads: HeadLayout

    @classmethod
    def of(
        cls,
        keys: KeyMoments,
        values: ValueMoments,
        captures: Sequence[AttentionCapture],
        heads: HeadLayout,
        slow: Sequence[float],
    ) -> WideBases:
        """From the moments of a layer that turns all planes; the other arguments as of `survey_wide_layer`."""
        return cls(_KeyBases.of(keys, captures, heads, slow), plain_basis(values), heads)

    @property
    def whole(self) -> Groups:
        """The one group of all heads."""
        return (tuple(range(self.heads.num_key_value_heads)),)

    def fused(self, key_width: int, value_width: int) -> dict[Side, tuple[Reconstruction, Groups]]:
        """Maps and groups of both sides at these widths, in channels."""
        keys = WideKeys((self.keys.at(key_width).narrowed(key_width),), self.heads.rotary_dim)
        return {"key": (keys, self.whole), "value": (WideValues((self.values.narrowed(value_width),)), self.whole)}


def wide_layer_plan(layer_idx: int, surveyed: LayerSurvey, keys: int, values: int, quantum: int) -> LayerPlan:
    """The plan of a layer that keeps these quanta of each side; a layer that keeps all of both is copied."""
    full = len(surveyed.key_groups)
    if keys == values == full:
        alone: Groups = tuple((head,) for head in surveyed.key_groups[0][0])
        return LayerPlan(layer_idx=layer_idx, key_groups=alone, value_groups=alone)
    whole = surveyed.key_groups[0]
    return LayerPlan(
        layer_idx=layer_idx,
        key_groups=whole,
        value_groups=whole,
        rotary_slots=surveyed.key_slots[keys - 1],
        still_planes=surveyed.key_still[keys - 1],
        key_widths=(keys * quantum,),
        value_widths=(values * quantum,),
    )


def one_width_plans(surveyed: Sequence[LayerSurvey], count: int, width: int) -> list[LayerPlan]:
    """The plans of all layers of a stock model with `count` heads of `width` channels and one table of slots."""
    table = slot_table([layer.slot_energy for layer in surveyed if layer.slot_energy is not None], width // 2)
    widths, slots = (width,) * count, (table,) * count
    return [
        LayerPlan(
            layer_idx=i,
            key_groups=layer.shared_groups[count],
            value_groups=layer.shared_groups[count],
            rotary_slots=slots,
            key_widths=widths,
            value_widths=widths,
        )
        for i, layer in enumerate(surveyed)
    ]
