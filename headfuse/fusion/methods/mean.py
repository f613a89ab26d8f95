"""`mean`: the plain average of a group (GQA, Ainslie et al., arXiv 2305.13245)."""

from __future__ import annotations

import torch

from headfuse.fusion.moments import KeyMoments, ValueMoments


def keys(moments: KeyMoments, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Complex write and read factors `[g, F]`: 1/g and 1."""
    one = torch.ones_like(moments.query_energy, dtype=torch.complex128)
    return one / len(one), one


def values(moments: ValueMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """Write and read maps `[g, d, d]`: I/g and I."""
    g, d = moments.output_gram.shape[:2]
    identity = torch.eye(d, dtype=torch.float64).expand(g, d, d)
    return identity / g, identity
