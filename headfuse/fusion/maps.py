"""The one form of every method (mathematics.md section 2.1): fused = sum_j P_j source_j, source_j ~ R_j fused."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headfuse.plan import Groups


@dataclass(frozen=True)
class KeyMoments:
    """Second moments of the keys of n source heads over the calibration text.

    `gram [F, n, n]` complex: E[k_i conj k_j] per frequency; `query_energy [n, F]`: E|q|^2 summed over the query heads
    that read the source head. Both are the same before and after RoPE, which turns all heads of a plane alike.
    `tail`, of the channels that are not rotated: any linear map may read them, so they are like values, with
    `covariance` of keys about their mean (the same score on every key changes no attention) and `output_gram` the sum
    of E[q q^T]. `normed`: a norm stands between projection and RoPE, so read maps are not folded into the queries.
    """

    gram: torch.Tensor
    query_energy: torch.Tensor
    tail: ValueMoments | None = None
    normed: bool = False

    def of(self, group: tuple[int, ...]) -> KeyMoments:
        """The moments of one group's heads."""
        index, tail = list(group), None if self.tail is None else self.tail.of(group)
        return KeyMoments(self.gram[:, index][:, :, index], self.query_energy[index], tail, self.normed)


@dataclass(frozen=True)
class ValueMoments:
    """Second moments of attention-averaged values, and how their errors are weighed.

    `covariance [n, d, n, d]`: E[u u^T] of the n heads' values averaged by the layer's own attention;
    `output_gram [n, d, d]`: sum of Wo_h^T Wo_h over the query heads that read the source head.
    """

    covariance: torch.Tensor
    output_gram: torch.Tensor

    def of(self, group: tuple[int, ...]) -> ValueMoments:
        """The moments of one group's heads."""
        index = list(group)
        return ValueMoments(self.covariance[index][:, :, index], self.output_gram[index])


@dataclass(frozen=True)
class HeadMaps:
    """Write maps `P [n, d, d]` and read maps `R [n, d, d]` of the n source heads, float64."""

    write: torch.Tensor
    read: torch.Tensor

    def reconstruct(self, heads: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Replace `heads [..., n, T, d]` by what the fused heads give back: R_j sum_i P_i x_i."""
        write, read = self.write.to(heads), self.read.to(heads)
        result = heads.clone()
        for group in groups:
            if len(group) > 1:
                index = list(group)
                fused = torch.einsum("...jtc,jdc->...td", heads[..., index, :, :], write[index])
                result[..., index, :, :] = torch.einsum("...td,jcd->...jtc", fused, read[index])
        return result


def planes(x: torch.Tensor) -> torch.Tensor:
    """Rotated channels `[..., 2 F]` in the canonical order as complex planes `[..., F]`: plane f is (f, f + F)."""
    first, second = x.chunk(2, dim=-1)
    return torch.complex(first.contiguous(), second.contiguous())


def plane_matrix(c: torch.Tensor) -> torch.Tensor:
    """Multiplication by `c [..., F]` on each plane, as real `[..., 2 F, 2 F]` matrices: it commutes with RoPE."""
    real, imag = torch.diag_embed(c.real), torch.diag_embed(c.imag)
    return torch.cat([torch.cat([real, -imag], dim=-1), torch.cat([imag, real], dim=-1)], dim=-2)


def slot_matrix(slots: tuple[int, ...]) -> torch.Tensor:
    """`[2 F, 2 F]`: puts the plane of frequency slots[s] into slot s; the identity for the stock order."""
    select = torch.nn.functional.one_hot(torch.tensor(slots), len(slots)).double()
    return torch.block_diag(select, select)
