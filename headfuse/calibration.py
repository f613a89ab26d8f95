"""What the calibration text says about one layer: moments of its heads, and the measured cost of fusing them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headfuse.architectures import architecture_of
from headfuse.fusion import FusionMethod
from headfuse.fusion.maps import HeadMaps, KeyMoments, ValueMoments, planes
from headfuse.grouping import GROUPERS
from headfuse.plan import Groups, HeadLayout
from headfuse.streaming import AttentionCapture

START_LENGTH, STARTS_PER_WINDOW, START_WEIGHT = 4, 16, 4.0
TINY = 1e-30
MAX_ROWS = 16384
"""Rows of averaged values that enter a covariance; more do not change it, and cost most on MHA models."""


@dataclass(frozen=True)
class CalibrationText:
    """Token windows: `statistics [n, T]`, `starts [m, START_LENGTH]` cut from them, and `held_out [k, T]`."""

    statistics: torch.Tensor
    starts: torch.Tensor
    held_out: torch.Tensor

    @classmethod
    def split(cls, windows: torch.Tensor, held_out: int) -> CalibrationText:
        """Keep the last `held_out` of the windows `[samples, T]` from the statistics."""
        used = len(windows) - held_out
        return cls(windows[:used], start_windows(windows[:used]), windows[used:])

    def part(self, share: float) -> CalibrationText:
        """The first `share` of the statistics windows, at least one, and nothing held out."""
        used = max(1, round(len(self.statistics) * share))
        return CalibrationText(self.statistics[:used], start_windows(self.statistics[:used]), self.held_out[:0])


def start_windows(windows: torch.Tensor) -> torch.Tensor:
    """Short windows from all over the text.

    The token at position 0 sees only itself, and in many models its attention outputs set off the massive activations
    that serve all later tokens as attention sink. A long window has one such token, so a fit on long windows alone
    breaks on first tokens that it never saw (docs/experiments.md).
    """
    length = min(START_LENGTH, windows.shape[1])
    stride = max(length, windows.shape[1] // STARTS_PER_WINDOW)
    offset = stride // 2 if windows.shape[1] >= stride // 2 + length else 0
    return windows[:, offset:].unfold(1, length, stride).flatten(0, 1)


def key_moments(captures: Sequence[AttentionCapture], heads: HeadLayout) -> KeyMoments:
    """Moments of one layer's keys: rotary planes, and what is not rotated (math.md 2, keys)."""
    n, rotated, tokens = heads.num_key_value_heads, heads.rotary_dim, 0.0
    gram = torch.zeros(rotated // 2, n, n, dtype=torch.complex128)
    energy = torch.zeros(n, rotated // 2, dtype=torch.float64)
    for capture in captures:
        k = planes(capture.key[..., :rotated]).to("cpu", torch.complex128)  # [B, n, T, F]
        k = k.permute(3, 1, 0, 2).flatten(2)  # [F, n, B T]
        gram += capture.weight * (k @ k.mH)
        q = planes(capture.query[..., :rotated]).abs().square().sum((0, 2)).to("cpu", torch.float64)  # [n_q, F]
        energy += capture.weight * q.unflatten(0, (n, heads.queries_per_head)).sum(1)
        tokens += capture.weight * k.shape[2]
    normed = architecture_of(heads.model_type).key_norm is not None
    return KeyMoments(gram / tokens, energy / tokens, _tail_moments(captures, heads), normed)


def _tail_moments(captures: Sequence[AttentionCapture], heads: HeadLayout) -> ValueMoments | None:
    """Moments of the channels of keys and queries that are not rotated, in the place of values and output weights."""
    n, rotated, rest, tokens = heads.num_key_value_heads, heads.rotary_dim, heads.head_dim - heads.rotary_dim, 0.0
    if not rest:
        return None
    gram, mean = torch.zeros(n * rest, n * rest, dtype=torch.float64), torch.zeros(n * rest, dtype=torch.float64)
    metric = torch.zeros(n, rest, rest, dtype=torch.float64)
    for capture in captures:
        k = capture.key[..., rotated:].to("cpu", torch.float64).transpose(1, 2).flatten(2).flatten(0, 1)  # [B T, n t]
        q = capture.query[..., rotated:].to("cpu", torch.float64)  # [B, n_q, T, t]
        q = q.unflatten(1, (n, -1)).transpose(0, 1).flatten(1, 3)  # [n, B q T, t]
        gram += capture.weight * (k.T @ k)
        mean += capture.weight * k.sum(0)
        metric += capture.weight * (q.mT @ q)
        tokens += capture.weight * len(k)
    mean /= tokens
    covariance = gram / tokens - torch.outer(mean, mean)
    return ValueMoments(covariance.view(n, rest, n, rest), metric / tokens)


def value_moments(
    captures: Sequence[AttentionCapture],
    output: torch.Tensor,
    heads: HeadLayout,
    key_maps: tuple[HeadMaps, Groups] | None,
) -> ValueMoments:
    """Moments of values averaged by attention, the fused keys' attention where maps are given (math.md 2, values).

    Args:
        captures: the layer on the calibration windows.
        output: output projection `[D, n_q, d]`.
        heads: the source's heads.
        key_maps: maps and groups of the fused keys.
    """
    n, d = heads.num_key_value_heads, heads.head_dim
    covariance = torch.zeros(n * d, n * d, dtype=torch.float64)
    rows = sum(c.query.shape[0] * c.query.shape[1] * c.query.shape[2] for c in captures)
    stride, total = max(1, rows // max(MAX_ROWS, 16 * n * d)), 0.0
    for capture in captures:
        key = None if key_maps is None else key_maps[0].reconstruct(capture.key, key_maps[1])
        step = stride if capture.query.shape[2] > 8 * stride else 1  # short windows are few: keep every row
        attention = capture.probabilities(key)[:, :, ::step]  # [B, n_q, T', T]
        stacked = capture.value.transpose(1, 2).flatten(2)  # [B, T, n d]
        count = attention.shape[:3].numel()
        if n * d < capture.value.shape[2]:
            left = right = (attention @ stacked[:, None]).flatten(0, 2).to("cpu", torch.float64)
        else:  # MHA: the same sum, all heads' attention first
            attention, left = attention.flatten(1, 2).to("cpu", torch.float64), stacked.to("cpu", torch.float64)
            left, right = left.flatten(0, 1), (attention.mT @ attention @ left).flatten(0, 1)
        covariance += capture.weight * step * (left.T @ right)  # float32 sums leave noise above the eigenvalue cut
        total += capture.weight * step * count
    weight = output.to("cpu", torch.float64)
    per_head = weight.view(weight.shape[0], n, -1, d)  # [D, n, q, d]
    output_gram = torch.einsum("Dnqc,Dnqe->nce", per_head, per_head)
    return ValueMoments((covariance / total).view(n, d, n, d), output_gram)


def lost_key_energy(maps: HeadMaps, groups: Groups, moments: KeyMoments) -> float:
    """Energy of what the fused keys do not give back, each head weighted by its queries' energy (math.md 2, keys)."""
    frequencies, lost = moments.gram.shape[0], 0.0
    for group in groups:
        if len(group) > 1:
            index, own = list(group), moments.of(group)
            write, read = maps.write[index][:, :, :frequencies], maps.read[index]
            product = torch.complex(  # R_i P_j on each plane, [F, g, g]
                torch.einsum("ifb,jbf->fij", read[:, :frequencies], write),
                torch.einsum("ifb,jbf->fij", read[:, frequencies : 2 * frequencies], write),
            )
            residual = torch.eye(len(group)) - product
            errors = torch.einsum("fij,fjk,fik->fi", residual, own.gram, residual.conj()).real
            lost += float((errors * own.query_energy.T).sum())
    if moments.tail is not None:
        rest = slice(2 * frequencies, None)
        lost += lost_value_energy(HeadMaps(maps.write[:, rest, rest], maps.read[:, rest, rest]), groups, moments.tail)
    return max(lost, 0.0)


def lost_value_energy(maps: HeadMaps, groups: Groups, moments: ValueMoments) -> float:
    """Energy of the attention output that the fused values do not give back (math.md 2, values)."""
    d, lost = moments.output_gram.shape[1], 0.0
    for group in groups:
        if len(group) > 1:
            index, g, own = list(group), len(group), moments.of(group)
            write = maps.write[index].transpose(0, 1).reshape(d, g * d)  # [d, g d]
            read, covariance = maps.read[index].reshape(g * d, d), own.covariance.reshape(g * d, g * d)
            rest = covariance - read @ (write @ covariance)  # (I - R P) C
            residual = torch.eye(g * d, dtype=torch.float64) - read @ write
            errors = rest.view(g, d, g * d) @ residual.view(g, d, g * d).mT  # [g, d, d]
            lost += float((errors * own.output_gram).sum())
    return max(lost, 0.0)


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
    share = energy[:, :, None] * energy[:, None, :] / (energy[:, :, None] + energy[:, None, :]).clamp_min(1e-300)
    return (apart.clamp_min(0) * share).sum(0).fill_diagonal_(0)


def value_pair_cost(moments: ValueMoments) -> torch.Tensor:
    """`[n, n]`: share of the layer's output energy lost when two value heads become one (rank d of 2d)."""
    cost, energy = _pair_energy(moments)
    return cost / energy.clamp_min(1e-300)


def _pair_energy(moments: ValueMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy lost when two heads become one, `[n, n]`, and that of all heads."""
    n, d = moments.output_gram.shape[:2]
    eigenvalues, vectors = torch.linalg.eigh(moments.output_gram)
    root = vectors * eigenvalues.clamp_min(0).sqrt()[:, None] @ vectors.mT  # [n, d, d]
    weighted = torch.einsum("iac,icjd,jdb->iajb", root, moments.covariance, root)
    cost = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1, n):
            pair = weighted[[i, j]][:, :, [i, j]].reshape(2 * d, 2 * d)
            cost[i, j] = cost[j, i] = torch.linalg.eigvalsh(pair)[:d].clamp_min(0).sum()
    return cost, torch.einsum("iaia->", weighted)


@dataclass(frozen=True)
class LayerSurvey:
    """One layer's pair costs, the groups for each count, and the measured cost of each count."""

    key_pairs: list[list[float]]
    value_pairs: list[list[float]]
    key_energy: list[float]
    value_energy: list[float]
    key_groups: list[Groups]
    key_slots: list[Groups | None]
    value_groups: list[Groups]
    shared_groups: dict[int, Groups]
    costs: dict[str, SideCosts]
    """Of the sides `key` and `value`, where the allocator reads costs of fusing."""


@dataclass(frozen=True)
class SideCosts:
    """What keeping 1 to n key heads or value heads of a layer costs.

    `lost [n]` is the closed form's lost energy; `measured` gives the cost of some counts, 0 for n; `maps` are those of
    the measured counts below n.
    """

    lost: list[float]
    measured: dict[int, float]
    maps: dict[int, tuple[HeadMaps, Groups]]

    def row(self) -> list[float]:
        """The row of the cost table, `[n]`."""
        return _between(self.lost, self.measured)


def survey_layer(
    captures: Sequence[AttentionCapture],
    output: torch.Tensor,
    hidden: torch.Tensor,
    heads: HeadLayout,
    method: FusionMethod,
    grouping: str,
    costs: bool,
    slots: bool,
    every_count: bool = False,
    shared_groups: bool = False,
) -> LayerSurvey:
    """Measure one source layer: groups for every head count, and what fusing to that count costs.

    `slots` lets fused key heads choose their rotary slots; with `shared_groups` counts that divide the source's are
    those of one partition of keys and values into groups of one size, and are the ones measured. The cost is the error
    of the attention output, E|y' - y|^2, over the energy of the residual stream, measured at counts that are powers of
    two, or at `every_count`.
    """
    n = heads.num_key_value_heads
    keys, values = key_moments(captures, heads), value_moments(captures, output, heads, None)
    key_pairs, value_pairs = key_pair_cost(keys, slots).tolist(), value_pair_cost(values).tolist()
    grouper = GROUPERS[grouping]
    both = [[a + b for a, b in zip(r, s, strict=True)] for r, s in zip(key_pairs, value_pairs, strict=True)]
    key_groups = [grouper(key_pairs, count, False) for count in range(1, n + 1)]
    value_groups = [grouper(value_pairs, count, False) for count in range(1, n + 1)]
    shared = {count: grouper(both, count, True) for count in range(1, n + 1) if n % count == 0}
    if shared_groups:
        key_groups = [shared.get(count, groups) for count, groups in enumerate(key_groups, start=1)]
        value_groups = [shared.get(count, groups) for count, groups in enumerate(value_groups, start=1)]
    key_slots = [method.rotary_slots(groups, keys) if slots else None for groups in key_groups]
    measured = dict[str, SideCosts]()
    if costs:
        energy = hidden.square().sum(-1).mean().item()
        ordinary = [capture for capture in captures if capture.weight == 1]
        probe = ordinary[: max(1, len(ordinary) // 4)]
        sides = {side: SideCosts([0.0] * n, {n: 0.0}, {}) for side in ("key", "value")}
        for count in range(1, n):
            groups = key_groups[count - 1], value_groups[count - 1]
            key_map, value_map = (
                method.key_maps(groups[0], keys, key_slots[count - 1]),
                method.value_maps(groups[1], values),
            )
            sides["key"].lost[count - 1] = lost_key_energy(key_map, groups[0], keys)
            sides["value"].lost[count - 1] = lost_value_energy(value_map, groups[1], values)
            if count in shared if shared_groups else every_count or count & (count - 1) == 0:
                sides["key"].maps[count], sides["value"].maps[count] = (key_map, groups[0]), (value_map, groups[1])
                sides["key"].measured[count] = _error(probe, output, key_map, groups[0], None, None) / energy
                sides["value"].measured[count] = _error(probe, output, None, None, value_map, groups[1]) / energy
        measured = sides
    return LayerSurvey(
        key_pairs,
        value_pairs,
        _key_energy(keys),
        _value_energy(values),
        key_groups,
        key_slots,
        value_groups,
        shared,
        measured,
    )


def _key_energy(moments: KeyMoments) -> list[float]:
    energy = (moments.gram.diagonal(dim1=1, dim2=2).real.T * moments.query_energy).sum(1)
    if moments.tail is not None:
        energy = energy + torch.einsum("iaib,iab->i", moments.tail.covariance, moments.tail.output_gram)
    return (energy / energy.sum().clamp_min(1e-300)).tolist()


def _value_energy(moments: ValueMoments) -> list[float]:
    energy = torch.einsum("iaib,iab->i", moments.covariance, moments.output_gram)
    return (energy / energy.sum().clamp_min(1e-300)).tolist()


def _between(lost: list[float], measured: dict[int, float]) -> list[float]:
    """Measured costs where there are any; elsewhere the lost energy, scaled like the nearest measured counts."""
    scale = {c: math.log((cost + TINY) / (lost[c - 1] + TINY)) for c, cost in measured.items() if cost > 0}
    costs = []
    for count, energy in enumerate(lost, start=1):
        below = max((c for c in scale if c <= count), default=None)
        above = min((c for c in scale if c >= count), default=below)
        if count in measured or below is None or above is None:
            costs.append(measured.get(count, energy))
            continue
        share = 0.0 if above == below else (count - below) / (above - below)
        costs.append((energy + TINY) * math.exp(scale[below] * (1 - share) + scale[above] * share))
    return costs


def _error(
    captures: Sequence[AttentionCapture],
    output: torch.Tensor,
    key_map: HeadMaps | None,
    key_groups: Groups | None,
    value_map: HeadMaps | None,
    value_groups: Groups | None,
) -> float:
    total, tokens = 0.0, 0
    for capture in captures:
        key = key_map.reconstruct(capture.key, key_groups) if key_map and key_groups else capture.key
        value = value_map.reconstruct(capture.value, value_groups) if value_map and value_groups else capture.value
        repeats = capture.query.shape[1] // value.shape[1]
        heads = capture.probabilities(key) @ value.repeat_interleave(repeats, dim=1)  # [B, n_q, T, d]
        delta = heads.transpose(1, 2) - capture.output
        total += torch.einsum("Dqc,btqc->btD", output.float().to(delta.device), delta).square().sum().item()
        tokens += delta.shape[0] * delta.shape[1]
    return total / tokens
