"""The one form of every method (mathematics.md section 2.1): fused = sum_j P_j source_j, source_j ~ R_j fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from headfuse.plan import Groups


class Reconstruction(Protocol):
    """Reconstructs the source's heads from the fused ones."""

    def reconstruct(self, heads: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Replace `heads [..., n, T, d]` by their reconstruction from the fused heads of these groups."""


@dataclass(frozen=True)
class HeadMaps:
    """Write maps `P [n, d, d]` and read maps `R [n, d, d]` of the n source heads, float64."""

    write: torch.Tensor
    read: torch.Tensor

    def reconstruct(self, heads: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Replace `heads [..., n, T, d]` by their reconstruction from the fused heads: R_j sum_i P_i x_i."""
        shared = [group for group in groups if len(group) > 1]
        if not shared:
            return heads
        place = torch.tensor([[h, k] for k, group in enumerate(shared) for h in group], device=heads.device)
        members, fused = place.unbind(1)
        write, read = self.write.to(heads)[members], self.read.to(heads)[members]
        written = heads.index_select(-3, members) @ write.mT  # [..., m, T, d]
        cached = written.new_zeros(*heads.shape[:-3], len(shared), *heads.shape[-2:]).index_add(-3, fused, written)
        return heads.index_copy(-3, members, cached.index_select(-3, fused) @ read.mT)


def plane_matrix(c: torch.Tensor) -> torch.Tensor:
    """Multiplication by `c [..., F]` on each plane, as real `[..., 2 F, 2 F]` matrices: it commutes with RoPE."""
    real, imag = torch.diag_embed(c.real), torch.diag_embed(c.imag)
    return torch.cat([torch.cat([real, -imag], dim=-1), torch.cat([imag, real], dim=-1)], dim=-2)


def slot_matrix(slots: tuple[int, ...]) -> torch.Tensor:
    """Matrix `[2 F, 2 F]` that moves the plane of frequency slots[s] into slot s; the identity for the stock order."""
    select = torch.nn.functional.one_hot(torch.tensor(slots), len(slots)).double()
    return torch.block_diag(select, select)
