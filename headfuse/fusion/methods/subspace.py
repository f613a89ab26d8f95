"""`subspace`: the best shared head in the metric of the data, a reduced-rank regression (mathematics.md section 4)."""

from __future__ import annotations

import torch

from headfuse.fusion.moments import KeyMoments, ValueMoments

CUT = 1e-10
"""Eigenvalues below this share of the largest are numerical noise."""
EXACT, PASSES = 1024, 4


def slots(moments: KeyMoments) -> tuple[int, ...]:
    """The frequency of each of the d/2 slots of a fused head: the largest eigenvalues over all frequencies and ranks.

    Strong frequencies get several slots, weak ones none (mathematics.md section 4.3).
    """
    found = torch.linalg.eigvalsh(_weighted(moments)).flip(1)  # [F, g], falling
    frequencies, ranks = found.shape
    eigenvalues = found.tolist()
    order = sorted(
        ((f, r) for f in range(frequencies) for r in range(ranks)),
        key=lambda c: (-eigenvalues[c[0]][c[1]], c[1], c[0]),
    )
    return tuple(sorted(f for f, _ in order[:frequencies]))


def keys(moments: KeyMoments, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The best components of each slot's frequency, heads weighted by their queries' energy; factors `[g, slots]`."""
    index = torch.tensor(slots)
    rank = torch.tensor([slots[:i].count(f) for i, f in enumerate(slots)])  # a frequency's slots take its ranks in turn
    energy = moments.query_energy.T  # [F, g]
    eigenvalues, vectors = torch.linalg.eigh(_weighted(moments))
    top = eigenvalues[index, -1 - rank].clamp_min(0)[:, None]  # [S, 1]
    u, gram, energy = vectors[index, :, -1 - rank], moments.gram[index], energy[index]
    weight = energy.sqrt()
    write = u.conj() * weight  # s = sum_j conj(u_j) a_j k_j has energy `top`
    read = torch.einsum("sji,si->sj", gram, weight * u) / top.clamp_min(1e-300)  # regression of k_j on s
    live = top > CUT * eigenvalues.max()
    scale = ((read.abs().square() * energy).sum(1, keepdim=True) / energy.sum(1, keepdim=True).clamp_min(1e-300)).sqrt()
    scale = torch.where(live, scale, torch.ones_like(scale)).clamp_min(1e-150)
    write = torch.where(live, write * scale, torch.zeros_like(write))
    read = torch.where(live, read / scale, torch.zeros_like(read))
    return write.T.contiguous(), read.T.contiguous()


def normed_keys(moments: KeyMoments, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Means weighted by query energy: the least-squares key for queries that are not remapped; factors `[g, F]`."""
    energy = moments.query_energy
    total = energy.sum(0)
    share = torch.where(total > 0, energy / total.clamp_min(1e-300), torch.full_like(energy, 1 / len(energy)))
    return share.to(torch.complex128), torch.ones_like(share, dtype=torch.complex128)


def _weighted(moments: KeyMoments) -> torch.Tensor:
    """The Gram matrices `[F, g, g]` of a_j k_j."""
    weight = moments.query_energy.T.sqrt()
    return weight[:, :, None] * moments.gram * weight[:, None, :]


def values(moments: ValueMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-d subspace of the group's values as the output projection sees them; maps `[g, d, d]`."""
    covariance, root = moments.covariance, moments.root
    g, d = root.shape[:2]
    weighted = (root @ covariance.reshape(g, d, g * d)).view(g * d, g * d)
    weighted = (root @ weighted.mT.view(g, d, g * d)).view(g * d, g * d)  # N^1/2 C N^1/2
    energies, vectors = leading(weighted, d)
    live = energies > CUT * energies[-1].clamp_min(1e-300)
    energies, vectors = energies.clamp_min(1e-300).sqrt(), (vectors * live).view(g, d, d)
    write = root @ vectors / energies  # [g, d, components]: N^1/2 U and C N^1/2 U
    read = (covariance.reshape(g * d, g * d) @ write.view(g * d, d)).view(g, d, d)
    scale = (torch.einsum("iaia->", covariance) / (g * d)).sqrt().clamp_min(1e-150)  # as large as a source head
    return write.mT * scale, read / scale


def leading(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest eigenvalues of a positive matrix `[N, N]`, rising, and their vectors `[N, count]`.

    With more than EXACT rows it uses subspace iteration, which needs matrix products only. That is exact if the rank is
    at most twice `count`. Otherwise the sum of the eigenvalues is right to a few percent, the rest to half a percent.
    """
    if len(matrix) <= EXACT:
        energies, vectors = torch.linalg.eigh(matrix)
        return energies[-count:], vectors[:, -count:]
    generator = torch.Generator().manual_seed(0)  # of the CPU: the same numbers for every device
    start = torch.randn(len(matrix), 2 * count, dtype=matrix.dtype, generator=generator, device="cpu")
    image = matrix @ start.to(matrix.device)
    for _ in range(PASSES):
        basis = torch.linalg.qr(image).Q
        image = matrix @ basis
    small = basis.mT @ image
    energies, vectors = torch.linalg.eigh((small + small.mT) / 2)
    return energies[-count:], basis @ vectors[:, -count:]
