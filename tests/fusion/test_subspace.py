"""Method `subspace`: the same results by cheaper sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headfuse.fusion.methods import subspace
from tests.support.commands import fuse
from tests.support.model_outputs import logits
from tests.support.planted_heads import plant
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize(("rank", "tolerance"), [(4, 1e-12), (8, 1e-12), (60, 0.05)])
def test_leading_eigenvalues_by_matrix_products(monkeypatch: pytest.MonkeyPatch, rank: int, tolerance: float) -> None:
    factor = torch.randn(60, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    matrix = factor @ factor.T
    exact, _ = subspace.leading(matrix, 4)
    monkeypatch.setattr(subspace, "EXACT", 0)
    values, vectors = subspace.leading(matrix, 4)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close((vectors.T @ matrix @ vectors).diagonal(), values)
    assert abs(1 - values.sum() / exact.sum()) < tolerance


def test_planted_groups_are_lossless_by_matrix_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "EXACT", 0)
    model = tiny_model(tmp_path / "model")
    plant(model, [(0, 2), (1, 3)])
    fuse(model, tmp_path / "out", "--budget", "0.5", "--preset", "fast")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-3, atol=1e-3)
