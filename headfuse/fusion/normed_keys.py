"""Keys behind a norm (`q_norm`, `k_norm`): fused before it, with the weight of the norm fitted again.

A norm divides each token's key by a number of that token. A read map therefore cannot be folded into the queries. Only
heads that are plain copies of each other fuse without loss; they may differ by a scale if each head has its own norm
(docs/reference/families.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from headfuse.fusion.maps import HeadMaps
from headfuse.fusion.moments import KeyMoments
from headfuse.models.attention import AttentionWeights
from headfuse.models.capture import AttentionCapture
from headfuse.models.families import Architecture, architecture_of
from headfuse.models.placement import widened
from headfuse.plan import Groups, HeadLayout, head_of_source


def fit_normed_keys(
    source: AttentionWeights,
    fused: AttentionWeights,
    maps: HeadMaps,
    groups: Groups,
    moments: KeyMoments,
    captures: Sequence[AttentionCapture],
    heads: HeadLayout,
) -> AttentionWeights:
    """Fit the keys and the norm of `fused` to the means of the normed keys.

    The norm's weight minimises sum_j a_j^2 E|k_j - k~|^2 per channel, `a_j^2` the energy of the queries.

    Args:
        source: the layer's weights.
        fused: the folded weights; their `key`, `key_bias` and `key_norm` are replaced in the result.
        maps: of the keys; their write maps are diagonal.
        groups: of the keys.
        moments: of the keys.
        captures: the layer on the calibration windows, with the keys before their norm.
        heads: the source's heads.
    """
    assert source.key_norm is not None
    arch = architecture_of(heads.model_type)
    kind = arch.key_norm
    share = maps.write.diagonal(dim1=1, dim2=2)  # [n, d]
    norm = (source.key_norm.double() + arch.norm_offset).expand(len(share), -1)
    shared = len(source.key_norm) == 1
    gram = _before_norm(captures, arch.norm_centred)  # [d, n, n]
    energy = gram.diagonal(dim1=1, dim2=2).sum(0).clamp_min(1e-300)  # [n]
    mix, start = torch.empty_like(share), torch.empty(len(groups), share.shape[1], dtype=torch.float64)
    for s, group in enumerate(groups):
        index = list(group)
        own = norm[index].mean(0)
        own = torch.where(own.abs() > 1e-12, own, torch.ones_like(own))
        if kind == "head":
            mix[index] = share[index] * (energy[index].sqrt().mean() / energy[index].sqrt())[:, None]
            mix[index] *= 1.0 if shared else norm[index] / own
        else:  # a fused head has the weight in the common norm that its source heads had together
            mix[index] = share[index] * norm[index] / own
            mixed = torch.einsum("ic,cij,jc->", mix[index], gram[:, index][:, :, index], mix[index])
            rescale = (energy[index].sum() / len(share) * len(groups) / mixed.clamp_min(1e-300)).sqrt()
            mix[index], own = mix[index] * rescale, own / rescale
        start[s] = own
    return replace(
        fused,
        key=_mixed(source.key.double(), mix[..., None], groups),
        key_bias=None if source.key_bias is None else _mixed(source.key_bias.double(), mix, groups),
        key_norm=_fit_norm(norm, start, mix, groups, moments, captures, arch, shared) - arch.norm_offset,
    )


def _before_norm(captures: Sequence[AttentionCapture], centred: bool) -> torch.Tensor:
    """E[z_i z_j] `[d, n, n]` of the keys before their norm, less a head's mean if the norm subtracts it."""
    total, tokens = torch.zeros(()), 0.0
    for capture in captures:
        z = _keys(capture)
        z = z - z.mean(-1, keepdim=True) if centred else z
        z = z.permute(2, 1, 0)  # [d, n, B T]
        total = total + capture.weight * (z @ z.mT)
        tokens += capture.weight * z.shape[2]
    return total / tokens


def _keys(capture: AttentionCapture) -> torch.Tensor:
    """`[B T, n, d]`, float64."""
    assert capture.key_before_norm is not None
    return widened(capture.key_before_norm.flatten(0, 1))


def _mixed(heads: torch.Tensor, mix: torch.Tensor, groups: Groups) -> torch.Tensor:
    return torch.stack([(heads[list(group)] * mix[list(group)]).sum(0) for group in groups])


def _fit_norm(
    norm: torch.Tensor,
    start: torch.Tensor,
    mix: torch.Tensor,
    groups: Groups,
    moments: KeyMoments,
    captures: Sequence[AttentionCapture],
    arch: Architecture,
    shared: bool,
) -> torch.Tensor:
    """The norm's weight: `[1, d]` where all heads share it, else `[len(groups), d]`."""
    owner = head_of_source(groups)
    weight = moments.query_energy.repeat(1, 2)  # [n, d]: both channels of a plane
    if moments.tail is not None:
        weight = torch.cat([weight, moments.tail_energy], dim=1)
    wanted, found = torch.zeros_like(start), torch.zeros_like(start)
    for capture in captures:
        z = _keys(capture)
        mixed = _mixed(z.transpose(0, 1), mix[:, None], groups).transpose(0, 1)  # [N, len(groups), d]
        mixed, z = _normalised(mixed, arch), _normalised(z, arch)
        cross = torch.einsum("tnc,tnc->nc", z, mixed[:, owner]) * norm
        square = mixed.square().sum(0)[owner]
        for j, s in enumerate(owner):
            wanted[s] += capture.weight * weight[j] * cross[j]
            found[s] += capture.weight * weight[j] * square[j]
    if shared:
        wanted, found, start = wanted.sum(0, keepdim=True), found.sum(0, keepdim=True), norm[:1]
    return torch.where(found > 0, wanted / found.clamp_min(1e-300), start)


def _normalised(keys: torch.Tensor, arch: Architecture) -> torch.Tensor:
    dims = (-1,) if arch.key_norm == "head" else (-2, -1)
    keys = keys - keys.mean(dims, keepdim=True) if arch.norm_centred else keys
    return keys / keys.square().mean(dims, keepdim=True).sqrt().clamp_min(1e-12)
