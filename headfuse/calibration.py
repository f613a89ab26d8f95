"""Calibration text, and what it says about one layer: moments of its heads, and what fused heads lose of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headfuse.architectures import architecture_of
from headfuse.fusion.maps import HeadMaps, KeyMoments, ValueMoments, planes
from headfuse.plan import Groups, HeadLayout
from headfuse.streaming import AttentionCapture
from headfuse.text import with_start

START_LENGTH, STARTS_PER_WINDOW, START_WEIGHT = 4, 16, 4.0
MAX_ROWS = 16384
"""Rows of averaged values that enter a covariance; more do not change it, and cost most on MHA models."""


@dataclass(frozen=True)
class CalibrationText:
    """Token windows: `statistics [n, T]`, `starts [m, START_LENGTH]` cut from them, and `held_out [k, T]`.

    With a BOS token (`bos`), all of them begin with it.
    """

    statistics: torch.Tensor
    starts: torch.Tensor
    held_out: torch.Tensor
    bos: int | None = None

    @classmethod
    def split(cls, windows: torch.Tensor, held_out: int, bos: int | None = None) -> CalibrationText:
        """Keep the last `held_out` of the windows `[samples, T]` from the statistics."""
        used = len(windows) - held_out
        return cls(windows[:used], start_windows(windows[:used], bos), windows[used:], bos)

    def part(self, share: float) -> CalibrationText:
        """The first `share` of the statistics windows, at least one, and nothing held out."""
        used = max(1, round(len(self.statistics) * share))
        windows = self.statistics[:used]
        return CalibrationText(windows, start_windows(windows, self.bos), self.held_out[:0], self.bos)


def start_windows(windows: torch.Tensor, bos: int | None = None) -> torch.Tensor:
    """Short windows from all over the text; with `bos`, windows begin with it, and so do the short ones.

    The token at position 0 sees only itself, and in many models its attention outputs set off the massive activations
    that serve all later tokens as attention sink. A long window has one such token, so a fit on long windows alone
    breaks on first tokens that it never saw (docs/experiments.md).
    """
    if bos is not None:
        return with_start(_spread(windows[:, 1:], START_LENGTH - 1), bos)
    return _spread(windows, START_LENGTH)


def _spread(windows: torch.Tensor, longest: int) -> torch.Tensor:
    """Pieces of at most `longest` tokens from evenly spread places of windows `[n, T]`."""
    length = min(longest, windows.shape[1])
    stride = max(length, windows.shape[1] // STARTS_PER_WINDOW)
    offset = stride // 2 if windows.shape[1] >= stride // 2 + length else 0
    return windows[:, offset:].unfold(1, length, stride).flatten(0, 1)


def key_moments(captures: Sequence[AttentionCapture], heads: HeadLayout) -> KeyMoments:
    """Moments of one layer's keys: rotary planes, and what is not rotated (mathematics.md section 3.2)."""
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
    """Moments of values averaged by attention, the fused keys' where maps are given (mathematics.md section 3.3).

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
        key = capture.key if key_maps is None else key_maps[0].reconstruct(capture.key, key_maps[1])
        step = stride if capture.query.shape[2] > 8 * stride else 1  # short windows are few: keep every row
        attention = capture.probabilities(key, step)  # [B, n_q, T', T]
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
    """Energy of what the fused keys do not give back, weighted by that of the queries (mathematics.md section 8.2)."""
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
    """Energy of the attention output that the fused values do not give back (mathematics.md section 8.2)."""
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
