"""`subspace`: the best shared head in the metric of the data, a reduced-rank regression (math.md 2)."""

from __future__ import annotations

import torch

from headfuse.fusion.maps import KeyMoments, ValueMoments

CUT = 1e-10
"""Eigenvalues below this share of the largest are numerical noise."""


def slots(moments: KeyMoments) -> tuple[int, ...]:
    """The frequency of each of the d/2 slots of a fused head: the largest eigenvalues over all frequencies and ranks.

    Strong frequencies get several slots, weak ones none (math.md 2, rotary slots).
    """
    eigenvalues = torch.linalg.eigvalsh(_weighted(moments)).flip(1)  # [F, g], falling
    frequencies, ranks = eigenvalues.shape
    order = sorted(
        ((f, r) for f in range(frequencies) for r in range(ranks)),
        key=lambda c: (-float(eigenvalues[c]), c[1], c[0]),
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


def _weighted(moments: KeyMoments) -> torch.Tensor:
    """The Gram matrices `[F, g, g]` of a_j k_j."""
    weight = moments.query_energy.T.sqrt()
    return weight[:, :, None] * moments.gram * weight[:, None, :]


def values(moments: ValueMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-d subspace of the group's values as the output projection sees them; maps `[g, d, d]`."""
    g, d = moments.output_gram.shape[:2]
    covariance = moments.covariance.reshape(g * d, g * d)
    metric = torch.block_diag(*moments.output_gram)  # N = sum_h M_h^T M_h
    spectrum, basis = torch.linalg.eigh(covariance)
    spectrum = torch.where(spectrum > CUT * spectrum[-1], spectrum, torch.zeros_like(spectrum))
    root = (basis * spectrum.sqrt()) @ basis.T
    energies, vectors = torch.linalg.eigh(root @ metric @ root)
    energies, vectors = energies[-d:], vectors[:, -d:]
    live = energies > CUT * energies[-1].clamp_min(1e-300)
    read = root @ vectors * live  # C^1/2 V
    write = (vectors.T @ root @ metric) * torch.where(live, 1 / energies.clamp_min(1e-300), torch.zeros_like(energies))[
        :, None
    ]
    scale = (torch.trace(covariance) / (g * d)).sqrt().clamp_min(1e-150)  # as large as a source head
    return (write * scale).reshape(d, g, d).transpose(0, 1).contiguous(), (read / scale).reshape(g, d, d)
