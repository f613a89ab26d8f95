"""What lets large models through: weights read twice and written once, and the same results by cheaper sums."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import fuse, logits, plant, tiny_model

from headfuse import checkpoint
from headfuse.calibration import value_moments
from headfuse.checkpoint import Checkpoint, SafetensorsWriter
from headfuse.fusion import subspace
from headfuse.plan import HeadLayout
from headfuse.streaming import AttentionCapture


def test_weights_are_read_twice_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the survey, once for the conversion; fingerprint, guard and checksums take what is there."""
    model = tiny_model(tmp_path / "model", layers=3)
    read, written, hashed = Counter[str](), Counter[str](), Counter[str]()
    own_bytes, own_write, own_hash = Checkpoint._bytes, SafetensorsWriter.write, checkpoint.file_sha256

    def count_read(self: Checkpoint, name: str) -> torch.Tensor:
        read[name] += self.folder == model
        return own_bytes(self, name)

    def count_write(self: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        written[name] += 1
        own_write(self, name, tensor)

    def count_hash(path: Path) -> str:
        hashed[path.name] += 1
        return own_hash(path)

    monkeypatch.setattr(Checkpoint, "_bytes", count_read)
    monkeypatch.setattr(SafetensorsWriter, "write", count_write)
    monkeypatch.setattr(SafetensorsWriter, "read", lambda self, name: pytest.fail(f"{name} is read back"))
    monkeypatch.setattr(checkpoint, "file_sha256", count_hash)
    fuse(model, tmp_path / "out", "--budget", "0.5", "--preset", "fast")
    names = Checkpoint(model).shapes.keys()
    assert read.keys() == written.keys() == names
    assert set(read.values()) == {2}
    assert set(written.values()) == {1}
    assert "model.safetensors" not in hashed
    checkpoint.verify(tmp_path / "out")


@pytest.mark.parametrize("length", [8, 40])
def test_value_moments_are_those_of_averaged_values(length: int) -> None:
    """Whichever sum is the cheaper one: more channels than tokens, or fewer."""
    n, queries, d = 2, 4, 8
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    value, output = draw(3, n, length, d), draw(6, queries, d)
    capture = AttentionCapture(
        draw(3, queries, length, d), draw(3, n, length, d), value, draw(3, length, queries, d), None, 0.3
    )
    heads = HeadLayout(
        model_type="llama", num_hidden_layers=1, hidden_size=6, num_attention_heads=queries, num_key_value_heads=n,
        head_dim=d,
    )  # fmt: skip
    averaged = torch.einsum("bhts,bnsd->bhtnd", capture.probabilities().double(), value.double()).flatten(0, 2)
    expected = torch.einsum("rnc,rme->ncme", averaged, averaged) / len(averaged)
    torch.testing.assert_close(value_moments([capture], output, heads, None).covariance, expected, rtol=1e-5, atol=1e-7)


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
