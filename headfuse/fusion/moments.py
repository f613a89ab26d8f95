"""Second moments of a layer's keys and values over the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from headfuse.fusion.key_channels import KeyChannels
from headfuse.fusion.maps import Reconstruction
from headfuse.models.capture import AttentionCapture
from headfuse.models.placement import exact, widened
from headfuse.plan import Groups, HeadLayout


@dataclass(frozen=True)
class KeyMoments:
    """Second moments of the keys of n source heads over the calibration text.

    `gram [F, n, n]` complex: E[k_i conj k_j] per frequency, of keys after RoPE about the mean of their window, because
    adding one score to every key changes no attention; `query_energy [n, F]`: E|q|^2 summed over the query heads that
    read the source head. `tail`: moments of the channels that are not rotated. Any linear map may read them, so they
    are treated like values. Their `covariance` is about the mean of the window, too; their `output_gram` is the sum of
    E[q q^T]. `normed`: a norm stands between projection and RoPE, so read maps are not folded into the queries.
    `still`: the slowest rotary planes that are not in `gram`, but in the tail (key_channels.py).
    """

    gram: torch.Tensor
    query_energy: torch.Tensor
    tail: ValueMoments | None = None
    normed: bool = False
    still: int = 0

    @property
    def energy(self) -> torch.Tensor:
        """`[n, F]`: E|q|^2 E|k|^2 of each head on each plane."""
        return self.gram.diagonal(dim1=1, dim2=2).real.T * self.query_energy

    @property
    def tail_energy(self) -> torch.Tensor:
        """`[n, t]`: E|q|^2 of each channel that is not rotated, summed over the query heads of the source head."""
        assert self.tail is not None
        return self.tail.output_gram.diagonal(dim1=1, dim2=2)

    def of(self, group: tuple[int, ...]) -> KeyMoments:
        """The moments of one group's heads."""
        index, tail = list(group), None if self.tail is None else self.tail.of(group)
        return replace(self, gram=self.gram[:, index][:, :, index], query_energy=self.query_energy[index], tail=tail)


@dataclass(frozen=True)
class ValueMoments:
    """Second moments of attention-averaged values, and how their errors are weighed.

    `covariance [n, d, n, d]`: E[u u^T] of the n heads' values averaged by the layer's own attention;
    `output_gram [n, d, d]`: sum of Wo_h^T Wo_h over the query heads that read the source head.
    """

    covariance: torch.Tensor
    output_gram: torch.Tensor
    known_root: torch.Tensor | None = None
    """The `root`, if it has been computed already."""

    @cached_property
    def root(self) -> torch.Tensor:
        """`[n, d, d]`: N^1/2 of every head's `output_gram` N."""
        if self.known_root is not None:
            return self.known_root
        spectrum, basis = torch.linalg.eigh(self.output_gram)
        return (basis * spectrum.clamp_min(0).sqrt()[:, None]) @ basis.mT

    def of(self, group: tuple[int, ...]) -> ValueMoments:
        """The moments of one group's heads."""
        index = list(group)
        return ValueMoments(self.covariance[index][:, :, index], self.output_gram[index], self.root[index])


def about_mean(capture: AttentionCapture, keys: torch.Tensor) -> torch.Tensor:
    """Keys after RoPE, or what is cached of them, `[..., T, c]`, less their mean over the tokens of each window.

    A key that is added to all keys of a window adds one number to all scores of a query, and a softmax does not see it.
    A cap of the scores or a sink beside them does: there keys stay as they are.
    """
    return keys - keys.mean(-2, keepdim=True) if capture.plain_softmax else keys


MAX_ROWS = 16384
"""Rows of averaged values that enter a covariance. More rows do not change it, and cost most on MHA models."""


def key_moments(captures: Sequence[AttentionCapture], heads: HeadLayout, still: int = 0) -> KeyMoments:
    """Moments of one layer's keys: rotary planes, and unrotated channels (mathematics.md section 3.2).

    Args:
        captures: the layer on the calibration windows.
        heads: the source's heads.
        still: rotary planes, the slowest ones, that count as channels that are not rotated.
    """
    n, channels, tokens = heads.num_key_value_heads, KeyChannels(heads.rotary_dim, still), 0.0
    place = exact(captures[0].key.device)
    gram = torch.zeros(channels.planes, n, n, dtype=torch.complex128, device=place)
    energy = torch.zeros(n, channels.planes, dtype=torch.float64, device=place)
    for capture in captures:
        k = about_mean(capture, widened(channels.split(capture.key)[0]))  # [B, n, T, F]
        k = k.permute(3, 1, 0, 2).flatten(2)  # [F, n, B T]
        gram += capture.weight * (k @ k.mH)
        q = widened(channels.split(capture.query)[0].abs().square().sum((0, 2)))  # [n_q, F]
        energy += capture.weight * q.unflatten(0, (n, heads.queries_per_head)).sum(1)
        tokens += capture.weight * k.shape[2]
    normed = captures[0].key_before_norm is not None
    return KeyMoments(gram / tokens, energy / tokens, _tail_moments(captures, heads, channels), normed, still)


def with_still_planes(
    moments: KeyMoments, captures: Sequence[AttentionCapture], heads: HeadLayout, still: int
) -> KeyMoments:
    """What `key_moments` gives with `still` planes, from the moments of a layer that turns all of them."""
    channels = KeyChannels(heads.rotary_dim, still)
    gram, energy = moments.gram[: channels.planes], moments.query_energy[:, : channels.planes]
    tail = _tail_moments(captures, heads, channels)
    return replace(moments, gram=gram, query_energy=energy, tail=tail, still=still)


def _tail_moments(
    captures: Sequence[AttentionCapture], heads: HeadLayout, channels: KeyChannels
) -> ValueMoments | None:
    """Moments of the unrotated channels: keys are treated as values, and queries as output weights."""
    n, rest, tokens = heads.num_key_value_heads, heads.head_dim - 2 * channels.planes, 0.0
    if not rest:
        return None
    zeros = partial(torch.zeros, dtype=torch.float64, device=exact(captures[0].key.device))
    gram, metric = zeros(n * rest, n * rest), zeros(n, rest, rest)
    for capture in captures:
        k = about_mean(capture, widened(channels.split(capture.key)[1]))  # [B, n, T, t]
        k = k.transpose(1, 2).flatten(2).flatten(0, 1)  # [B T, n t]
        q = widened(channels.split(capture.query)[1])  # [B, n_q, T, t]
        q = q.unflatten(1, (n, -1)).transpose(0, 1).flatten(1, 3)  # [n, B q T, t]
        gram += capture.weight * (k.T @ k)
        metric += capture.weight * (q.mT @ q)
        tokens += capture.weight * len(k)
    return ValueMoments((gram / tokens).view(n, rest, n, rest), metric / tokens)


def value_moments(
    captures: Sequence[AttentionCapture],
    output: torch.Tensor,
    heads: HeadLayout,
    key_maps: tuple[Reconstruction, Groups] | None,
) -> ValueMoments:
    """Moments of values averaged by attention: by that of the fused keys, if given (mathematics.md section 3.3).

    Args:
        captures: the layer on the calibration windows.
        output: output projection `[D, n_q, d]`.
        heads: the source's heads.
        key_maps: maps and groups of the fused keys.
    """
    n, d = heads.num_key_value_heads, heads.head_dim

    def keys(index: int) -> torch.Tensor:
        key = captures[index].key
        return key if key_maps is None else key_maps[0].reconstruct(key, key_maps[1])

    covariance = averaged(captures, lambda index: captures[index].value.transpose(1, 2).flatten(2), keys, n * d)
    return ValueMoments(covariance.view(n, d, n, d), output_gram(output, heads))


def averaged(
    captures: Sequence[AttentionCapture],
    states: Callable[[int], torch.Tensor],
    keys: Callable[[int], torch.Tensor],
    width: int,
) -> torch.Tensor:
    """Moments `[w, w]` of states averaged by a layer's attention.

    Args:
        captures: the layer on the calibration windows.
        states: of each capture `[B, T, w]`, at least the source's values.
        keys: of each capture, for the attention, `[B, n, T, d]`.
        width: of the source's values.
    """
    total, covariance = 0.0, torch.zeros((), dtype=torch.float64, device=exact(captures[0].key.device))
    rows = sum(c.query.shape[0] * c.query.shape[1] * c.query.shape[2] for c in captures)
    stride = max(1, rows // max(MAX_ROWS, 16 * width))
    for index, capture in enumerate(captures):
        step = stride if capture.query.shape[2] > 8 * stride else 1  # short windows are few: keep every row
        attention, stacked = capture.probabilities(keys(index), step), states(index)  # [B, n_q, T', T], [B, T, w]
        count = attention.shape[:3].numel()
        if stacked.shape[2] < stacked.shape[1]:
            left = right = widened((attention @ stacked[:, None]).flatten(0, 2))
        else:  # MHA: the same sum, all heads' attention first
            attention, left = widened(attention.flatten(1, 2)), widened(stacked)
            left, right = left.flatten(0, 1), (attention.mT @ attention @ left).flatten(0, 1)
        covariance = covariance + capture.weight * step * (left.T @ right)  # float32 sums leave noise above the cut
        total += capture.weight * step * count
    return covariance / total


def output_gram(output: torch.Tensor, heads: HeadLayout) -> torch.Tensor:
    """`[n, d, d]`: the sum of Wo_h^T Wo_h over the query heads that read each source head."""
    weight = widened(output)
    per_head = weight.view(weight.shape[0], heads.num_key_value_heads, -1, heads.head_dim)  # [D, n, q, d]
    return torch.einsum("Dnqc,Dnqe->nce", per_head, per_head)
