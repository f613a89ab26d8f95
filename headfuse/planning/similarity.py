"""How alike the heads of a layer are. Pure functions."""

from __future__ import annotations

import torch


def linear_cka(weight: torch.Tensor) -> torch.Tensor:
    """Linear CKA between heads' weights `[n, d, D]` -> `[n, n]` (DHA, arXiv 2406.06567, appendix B.1).

    ||W_i W_j^T||_F^2 / (||W_i W_i^T||_F ||W_j W_j^T||_F), uncentred as in the paper.
    """
    n, _, width = weight.shape
    weight = weight.double()
    products = torch.einsum("iaD,jbD->ijab", weight, weight) if width else torch.zeros(n, n, 1, 1)
    norms = products.square().sum((2, 3))
    scale = norms.diagonal().sqrt()
    return norms / (scale[:, None] * scale[None, :]).clamp_min(1e-300)


def aligned_similarity(pair_cost: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """Similarity after the best function-preserving alignment, `[n, n]` in [0, 1].

    Args:
        pair_cost: `[n, n]` energy lost when two heads become one.
        energy: `[n]` energy of each head, in the same units.

    One minus twice the lost share: 1 for heads equal up to such a map, 0 when half of the pair's energy is lost.
    """
    total = energy[:, None] + energy[None, :]
    return (1 - 2 * pair_cost / total.clamp_min(1e-300)).clamp(0, 1)


def redundancy(similarity: torch.Tensor) -> float:
    """Mean similarity over the pairs of a layer (DHA, section 3.2); 0 for a single head."""
    n = len(similarity)
    return float((similarity.sum() - similarity.diagonal().sum()) / (n * (n - 1))) if n > 1 else 0.0
