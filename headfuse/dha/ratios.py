"""`dha`: learned ratios of the heads of a group (DHA, arXiv 2406.06567, section 4); equation numbers are the paper's.

Untrained ratios, the identity, collapse to the mean of the group. Groups are partitions of m heads; `readers
[n_q]` is the head that each query head reads; ratios `omega [n_q, m, d]` are one number per channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headfuse.plan import Groups


def identity(readers: Sequence[int], num_heads: int, head_dim: int) -> torch.Tensor:
    """Ratios with which every query head reads its own head alone `[n_q, m, d]`: the source, exactly."""
    one = torch.nn.functional.one_hot(torch.tensor(readers), num_heads)
    return one[:, :, None].float().repeat(1, 1, head_dim)


def members(groups: Groups) -> torch.Tensor:
    """Which heads fuse with which `[m, m]`; not those that stay alone."""
    same = torch.zeros(sum(map(len, groups)), sum(map(len, groups)), dtype=torch.bool)
    for group in groups:
        if len(group) > 1:
            same[torch.tensor(group)[:, None], torch.tensor(group)] = True
    return same


def fuse(omega: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The projection of every query head `[n_q, d, D]` from those of the heads `[m, d, D]` (equation 5)."""
    return torch.einsum("hjd,jdD->hdD", omega, weight)


def head_loss(omega: torch.Tensor, size: int) -> torch.Tensor:
    """L_head of every pair of query heads that share a group of `size` heads `[n_q, n_q]` (equation 6).

    Per channel, so that it means the same at every head_dim; the paper's sum is head_dim times this.
    """
    difference = omega[:, None] - omega[None, :]
    return difference.square().sum(2).mean(-1) / size


def fusion_loss(omega: torch.Tensor, groups: Groups, readers: Sequence[int]) -> tuple[torch.Tensor, int]:
    """L_fusion of one layer's keys or values: the sum of L_head over the pairs of each group, and their number (7)."""
    total, pairs = omega.new_zeros(()), 0
    for group in groups:
        index = [query for query, head in enumerate(readers) if head in group]
        if len(group) > 1:
            total = total + head_loss(omega[index][:, list(group)], len(group)).sum() / 2
            pairs += len(index) * (len(index) - 1) // 2
    return total, pairs


def target(step: int, base: float, warmup: int) -> float:
    """What the fusion loss may still be at a step counted from 0: t = max(0, b^s (1 - s / k)) (equation 8)."""
    return max(0.0, base**step * (1 - step / max(1, warmup)))


def collapse(omega: torch.Tensor, weight: torch.Tensor, groups: Groups, readers: Sequence[int]) -> torch.Tensor:
    """One head per group `[len(groups), d, D]` from the mean of its query heads' ratios (section 4.3)."""
    heads = []
    for group in groups:
        if len(group) == 1:
            heads.append(weight[group[0]])
        else:
            index = [query for query, head in enumerate(readers) if head in group]
            mean = omega[index].mean(0, keepdim=True)[:, list(group)]
            heads.append(fuse(mean, weight[list(group)])[0])
    return torch.stack(heads)
