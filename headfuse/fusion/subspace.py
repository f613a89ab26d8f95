"""`subspace`: the best shared head in the metric of the data, a reduced-rank regression (math.md 2)."""

from __future__ import annotations

import torch

from headfuse.fusion.maps import KeyMoments, ValueMoments

CUT = 1e-10
"""Eigenvalues below this share of the largest are numerical noise."""


def keys(moments: KeyMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank one per frequency, each head weighted by the energy of its queries; complex factors `[g, F]`."""
    gram, energy = moments.gram, moments.query_energy.T  # [F, g, g], [F, g]
    weight = energy.sqrt()
    weighted = weight[:, :, None] * gram * weight[:, None, :]
    eigenvalues, vectors = torch.linalg.eigh(weighted)
    top, u = eigenvalues[:, -1:].clamp_min(0), vectors[:, :, -1]  # [F, 1], [F, g]
    write = u.conj() * weight  # s = sum_j conj(u_j) a_j k_j has energy `top`
    read = torch.einsum("fji,fi->fj", gram, weight * u) / top.clamp_min(1e-300)  # regression of k_j on s
    live = top > CUT * top.max()
    scale = ((read.abs().square() * energy).sum(1, keepdim=True) / energy.sum(1, keepdim=True).clamp_min(1e-300)).sqrt()
    scale = torch.where(live, scale, torch.ones_like(scale)).clamp_min(1e-150)
    write = torch.where(live, write * scale, torch.zeros_like(write))
    read = torch.where(live, read / scale, torch.zeros_like(read))
    return write.T.contiguous(), read.T.contiguous()


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
