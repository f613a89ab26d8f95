"""`first`: keep the first head of a group (the ablation of arXiv 2305.13245)."""

from __future__ import annotations

import torch

from headfuse.fusion.methods import mean
from headfuse.fusion.moments import KeyMoments, ValueMoments


def first_keys(moments: KeyMoments, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Complex write and read factors `[g, F]`."""
    write, read = mean.keys(moments, slots)
    return _only_first(write * len(write)), read


def first_values(moments: ValueMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """Write and read maps `[g, d, d]`."""
    write, read = mean.values(moments)
    return _only_first(write * len(write)), read


def _only_first(write: torch.Tensor) -> torch.Tensor:
    write = write.clone()
    write[1:] = 0
    return write
