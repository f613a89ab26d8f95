"""`align`: rotate heads onto their group's mean, then average and restore the norm (after arXiv 2412.20677)."""

from __future__ import annotations

import torch

from headfuse.fusion.moments import KeyMoments, ValueMoments

ITERATIONS = 100


def keys(moments: KeyMoments, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """One unit phase per head and frequency (the rotations that commute with RoPE); factors `[g, F]`."""
    gram = moments.gram  # [F, g, g]
    g = gram.shape[-1]
    phase = torch.ones(gram.shape[0], g, dtype=torch.complex128)
    for _ in range(ITERATIONS):
        towards = torch.einsum("fji,fi->fj", gram, phase)  # E[k_j conj(mean)]
        phase = torch.where(towards.abs() > 0, towards / towards.abs().clamp_min(1e-300), phase)
    energy = torch.einsum("fjj->", gram).real / g
    mean_energy = torch.einsum("fi,fij,fj->", phase.conj(), gram, phase).real / g**2
    scale = (energy / mean_energy.clamp_min(1e-300)).sqrt()
    return phase.conj().T * scale / g, phase.T.contiguous()


def values(moments: ValueMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """One orthogonal matrix per head (Procrustes to the group mean); maps `[g, d, d]`."""
    covariance = moments.covariance  # [g, d, g, d]
    g, d = covariance.shape[:2]
    rotation = torch.eye(d, dtype=torch.float64).repeat(g, 1, 1)  # v_j ~ rotation_j mean
    for _ in range(ITERATIONS):
        cross = torch.einsum("jcie,ieb->jcb", covariance, rotation)  # E[v_j mean^T] up to 1/g
        left, _, right = torch.linalg.svd(cross)
        new = left @ right
        converged = (new - rotation).abs().max() < 1e-9
        rotation = new
        if converged:
            break
    energy = torch.einsum("jcjc->", covariance) / g
    mean_energy = torch.einsum("jca,jcie,iea->", rotation, covariance, rotation) / g**2
    scale = (energy / mean_energy.clamp_min(1e-300)).sqrt()
    return rotation.mT * scale / g, rotation
