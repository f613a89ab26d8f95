"""Survey of one layer: what pairs of heads share, the groups for every head count, and the costs of the counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from headfuse.choices import Side
from headfuse.fusion import FusionMethod, Maps
from headfuse.fusion.losses import lost_key_energy, lost_value_energy
from headfuse.fusion.maps import Reconstruction
from headfuse.fusion.moments import KeyMoments, ValueMoments, key_moments, value_moments
from headfuse.models.capture import AttentionCapture
from headfuse.plan import Groups, HeadLayout
from headfuse.planning.costs import measured_counts
from headfuse.planning.fused_variants import Fused
from headfuse.planning.grouping import GROUPERS
from headfuse.planning.slot_choice import slot_energy


def key_pair_cost(moments: KeyMoments, slots: bool) -> torch.Tensor:
    """`[n, n]`: share of the layer's key energy lost when two heads become one, with rotary slots or without."""
    weight = moments.query_energy.T.sqrt()
    gram = weight[:, :, None] * moments.gram * weight[:, None, :]  # [F, n, n]
    energy = gram.diagonal(dim1=1, dim2=2).real
    tail, tail_energy = (0.0, 0.0) if moments.tail is None else _pair_energy(moments.tail)
    scale = (energy.sum() + tail_energy).clamp_min(1e-300)
    if moments.normed:
        return _normed_pair_energy(moments) / scale
    total, difference = energy[:, :, None] + energy[:, None, :], energy[:, :, None] - energy[:, None, :]
    root = (difference.square() + 4 * gram.abs().square()).sqrt()
    lost = (total - root) / 2  # the smaller eigenvalue
    if slots:  # the smaller half of all eigenvalues
        lost = torch.cat([lost, (total + root) / 2]).sort(dim=0).values[: len(lost)]
    return (lost.clamp_min(0).sum(0).fill_diagonal_(0) + tail) / scale


def _normed_pair_energy(moments: KeyMoments) -> torch.Tensor:
    """`[n, n]`: energy lost when two heads behind a norm become their weighted mean, sum_f E|k_i - k_j|^2 ab/(a+b)."""
    energy = moments.query_energy.T  # [F, n]
    own = moments.gram.diagonal(dim1=1, dim2=2).real
    apart = own[:, :, None] + own[:, None, :] - 2 * moments.gram.real
    if moments.tail is not None:
        tail = moments.tail.covariance.diagonal(dim1=1, dim2=3).permute(2, 0, 1)  # [t, n, n]
        own = tail.diagonal(dim1=1, dim2=2)
        apart = torch.cat([apart, own[:, :, None] + own[:, None, :] - 2 * tail])
        energy = torch.cat([energy, moments.tail_energy.T])
    share = energy[:, :, None] * energy[:, None, :] / (energy[:, :, None] + energy[:, None, :]).clamp_min(1e-300)
    return (apart.clamp_min(0) * share).sum(0).fill_diagonal_(0)


def value_pair_cost(moments: ValueMoments) -> torch.Tensor:
    """`[n, n]`: share of the layer's output energy lost when two value heads become one (rank d of 2d)."""
    cost, energy = _pair_energy(moments)
    return cost / energy.clamp_min(1e-300)


def _pair_energy(moments: ValueMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy lost when two heads become one, `[n, n]`, and that of all heads."""
    (n, d), root = moments.output_gram.shape[:2], moments.root
    weighted = torch.einsum("iac,icjd,jdb->iajb", root, moments.covariance, root)
    cost = torch.zeros(n, n, dtype=torch.float64, device=weighted.device)
    for i in range(n - 1):
        others = torch.arange(i + 1, n, device=weighted.device)
        pairs = torch.stack([torch.full_like(others, i), others], dim=1)  # [p, 2]
        blocks = weighted[pairs[:, :, None], :, pairs[:, None, :]]  # [p, 2, 2, d, d]
        lost = torch.linalg.eigvalsh(blocks.transpose(2, 3).reshape(len(pairs), 2 * d, 2 * d))[:, :d].clamp_min(0)
        cost[i, i + 1 :] = cost[i + 1 :, i] = lost.sum(1)
    return cost, torch.einsum("iaia->", weighted)


@dataclass(frozen=True)
class SurveyOptions:
    """What is measured in every layer."""

    method: FusionMethod
    grouping: str
    """Name in GROUPERS."""
    slots: bool = False
    """Fused key heads choose their rotary slots."""
    shared_partition: bool = False
    """Keys and values share one partition into groups of one size, for the counts that divide the source's."""
    costs: bool = False
    """The allocator reads the measured costs of fusing."""
    every_count: bool = False
    """Measure the cost of every count; otherwise of powers of two, or of the counts that a shared partition allows."""
    one_width: int | None = None
    """Heads of each layer that have one width of their own; None where they keep the source's."""


@dataclass(frozen=True)
class LayerSurvey:
    """One layer's pair costs, the groups for each count, and what the closed form loses with each count."""

    key_pairs: list[list[float]]
    value_pairs: list[list[float]]
    """Pair costs `[n, n]`; empty for wide heads, which choose no groups by them, unless somebody looks at them."""
    key_energy: list[float]
    value_energy: list[float]
    key_groups: list[Groups]
    key_slots: list[Groups | None]
    value_groups: list[Groups]
    shared_groups: dict[int, Groups]
    lost: Mapping[Side, list[float]]
    """Lost energy of 1 to n heads of each side; empty where the allocator reads no costs of fusing."""
    slot_energy: torch.Tensor | None = None
    """Of slot_choice.py, for the groups of the one count; None where heads keep the source's width."""
    key_still: list[int] = field(default_factory=list)
    """Planes that do not turn, for each width of a wide key; empty for other heads."""


def survey_layer(
    captures: Sequence[AttentionCapture], output: torch.Tensor, heads: HeadLayout, options: SurveyOptions
) -> tuple[LayerSurvey, Fused]:
    """Measure one source layer: groups for every head count, and what fusing to that count loses.

    Args:
        captures: the layer on the calibration windows.
        output: output projection `[D, n_q, d]`.
        heads: the source's heads.
        options: what is measured.

    Returns:
        The survey, and the maps and groups of those counts whose cost is to be measured (error_probes.py).
    """
    n, slots, grouper = heads.num_key_value_heads, options.slots, GROUPERS[options.grouping]
    keys, values = key_moments(captures, heads), value_moments(captures, output, heads, None)
    key_pairs, value_pairs = key_pair_cost(keys, slots).tolist(), value_pair_cost(values).tolist()
    both = [[a + b for a, b in zip(r, s, strict=True)] for r, s in zip(key_pairs, value_pairs, strict=True)]
    key_groups = [grouper(key_pairs, count, False) for count in range(1, n + 1)]
    value_groups = [grouper(value_pairs, count, False) for count in range(1, n + 1)]
    shared = {count: grouper(both, count, True) for count in range(1, n + 1) if n % count == 0}
    if options.shared_partition:
        key_groups = [shared.get(count, groups) for count, groups in enumerate(key_groups, start=1)]
        value_groups = [shared.get(count, groups) for count, groups in enumerate(value_groups, start=1)]
    key_slots = [options.method.rotary_slots(groups, keys) if slots else None for groups in key_groups]
    lost, maps = dict[Side, list[float]](), dict[tuple[Side, int], tuple[Reconstruction, Groups]]()
    if options.costs:
        counts = set(shared) if options.shared_partition else set(measured_counts(n, options.every_count))
        lost = {"key": [0.0] * n, "value": [0.0] * n}
        known, alone = (
            dict[tuple[int, ...], Maps](),
            dict[tuple[int, ...], float](),
        )  # most groups are of several counts
        for count, key, value in zip(range(1, n), key_groups, value_groups, strict=False):
            key_maps = options.method.key_maps(key, keys, key_slots[count - 1])
            value_maps = options.method.value_maps(value, values, known)
            for group in value:
                if group not in alone:
                    alone[group] = lost_value_energy(value_maps, (group,), values)
            lost["key"][count - 1] = lost_key_energy(key_maps, key, keys)
            lost["value"][count - 1] = sum(alone[group] for group in value)
            if count in counts:
                maps["key", count], maps["value", count] = (key_maps, key), (value_maps, value)
    energy = key_energy(keys), value_energy(values)
    slot_share = None if options.one_width is None else slot_energy(keys, shared[options.one_width])
    survey = LayerSurvey(key_pairs, value_pairs, *energy, key_groups, key_slots, value_groups, shared, lost, slot_share)
    return survey, maps


def key_energy(moments: KeyMoments) -> list[float]:
    """Each head's share of the layer's key energy, as queries see it."""
    energy = moments.energy.sum(1)
    if moments.tail is not None:
        energy = energy + torch.einsum("iaib,iab->i", moments.tail.covariance, moments.tail.output_gram)
    return (energy / energy.sum().clamp_min(1e-300)).tolist()


def value_energy(moments: ValueMoments) -> list[float]:
    """Each head's share of the energy that values bring to the layer's output."""
    energy = torch.einsum("iaib,iab->i", moments.covariance, moments.output_gram)
    return (energy / energy.sum().clamp_min(1e-300)).tolist()
