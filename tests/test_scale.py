"""What lets large models through: weights read twice and written once, and the same results by cheaper sums."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fuse, logits, plant, run, tiny_model

from headfuse.checkpoint import plan_file
from headfuse.checkpoint.reader import Checkpoint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.fusion.methods import subspace
from headfuse.fusion.moments import value_moments
from headfuse.layouts import LAYOUTS
from headfuse.models.attention import AttentionWeights
from headfuse.models.capture import AttentionCapture
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import HeadLayout


def count_reads(monkeypatch: pytest.MonkeyPatch, model: Path) -> Counter[str]:
    """How often each tensor of a model is read from now on."""
    read, own_bytes = Counter[str](), Checkpoint._bytes

    def count_read(self: Checkpoint, name: str) -> torch.Tensor:
        read[name] += self.folder == model
        return own_bytes(self, name)

    monkeypatch.setattr(Checkpoint, "_bytes", count_read)
    return read


def test_weights_are_read_twice_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the survey, once for the conversion; fingerprint, guard and checksums take what is there."""
    model = tiny_model(tmp_path / "model", layers=3)
    read, written, hashed = count_reads(monkeypatch, model), Counter[str](), Counter[str]()
    own_write, own_hash = SafetensorsWriter.write, plan_file.file_sha256

    def count_write(self: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        written[name] += 1
        own_write(self, name, tensor)

    def count_hash(path: Path) -> str:
        hashed[path.name] += 1
        return own_hash(path)

    monkeypatch.setattr(SafetensorsWriter, "write", count_write)
    monkeypatch.setattr(SafetensorsWriter, "read", lambda self, name: pytest.fail(f"{name} is read back"))
    monkeypatch.setattr(plan_file, "file_sha256", count_hash)
    fuse(model, tmp_path / "out", "--budget", "0.5", "--preset", "fast")
    names = Checkpoint(model).shapes.keys()
    assert read.keys() == written.keys() == names
    assert set(read.values()) == {2}
    assert set(written.values()) == {1}
    assert "model.safetensors" not in hashed
    plan_file.verify(tmp_path / "out")


def test_analyze_reads_every_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The similarity of the weights is measured while the survey has them."""
    model = tiny_model(tmp_path / "model", layers=3)
    read = count_reads(monkeypatch, model)
    text = ("--data", tmp_path / "text.txt", "--samples", 4, "--sequence-length", 32)
    run("analyze", model, "--budget", "0.5", "--preset", "fast", *text)
    assert read.keys() == Checkpoint(model).shapes.keys()
    assert set(read.values()) == {1}


def test_a_walk_lets_go_of_the_layer_before(tmp_path: Path) -> None:
    """Even where somebody still names it, as the variable of a loop does; its use is an error, not an empty layer."""
    source = Source.open(str(tiny_model(tmp_path / "model", layers=2)))
    streamed = StreamedModel(source.checkpoint, source.config, torch.device("cpu"))
    walk = streamed.walk([streamed.embed(torch.arange(8)[None])])
    first = next(walk)
    held = [*first.tensors.values(), first.weights, first.captures[0]]
    alive = [weakref.ref(each) for each in held]
    del held
    assert all(ref() is not None for ref in alive)
    next(walk)
    assert not any(ref() is not None for ref in alive)
    with pytest.raises(AttributeError):
        _ = first.tensors


GAPS = """
import sys, torch
from headfuse.models.heap import keep_freed_blocks, release_freed_blocks
keep_freed_blocks()
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024
before, kept, freed = resident(), [], []
for _ in range(32):
    freed.append(torch.ones(2**22, dtype=torch.uint8))
    kept.append(torch.ones(2**16, dtype=torch.uint8))
del freed
release_freed_blocks()
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_blocks_leave_no_gaps() -> None:
    """128 MiB of tensors with small ones between them: they are a layer's, and the next layer's come on top."""
    result = subprocess.run([sys.executable, "-c", GAPS], check=True, capture_output=True, text=True)
    assert float(result.stdout) < 16


def test_one_layer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one layer was read as and fused to is gone when the next one is read."""
    model, alive, own = tiny_model(tmp_path / "model", layers=3), list[weakref.ref[Any]](), StreamedModel.layer_tensors
    arrange = LAYOUTS["decoupled"].arrange

    def layer_tensors(self: StreamedModel, layer_idx: int) -> dict[str, torch.Tensor]:
        assert not [ref for ref in alive if ref() is not None]
        return own(self, layer_idx)

    def watched(weights: AttentionWeights, *args: Any) -> AttentionWeights:
        arranged = arrange(weights, *args)
        alive.extend(weakref.ref(part) for part in (weights, arranged, arranged.key))
        return arranged

    monkeypatch.setattr(StreamedModel, "layer_tensors", layer_tensors)
    monkeypatch.setitem(LAYOUTS, "decoupled", replace(LAYOUTS["decoupled"], arrange=watched))
    fuse(model, tmp_path / "out", "--budget", "0.5", "--preset", "fast")
    assert len(alive) == 9


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
    attention = capture.probabilities(capture.key).double()
    averaged = torch.einsum("bhts,bnsd->bhtnd", attention, value.double()).flatten(0, 2)
    expected = torch.einsum("rnc,rme->ncme", averaged, averaged) / len(averaged)
    torch.testing.assert_close(value_moments([capture], output, heads, None).covariance, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_both_forms_of_attention_agree(mask: str | None) -> None:
    """The fused one, and probabilities of all or of every third query, under each kind of mask."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 10, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 10, 8, generator=generator)
    near = torch.ones(10, 10, dtype=torch.bool).tril().triu(-6)[None, None]
    biased = (torch.arange(1.0, 5).view(1, 4, 1, 1) * torch.arange(10.0)).masked_fill(~near, float("-inf"))
    masks = {"boolean": near, "additive": biased}
    capture = AttentionCapture(query, key, value, torch.empty(2, 10, 4, 8), masks.get(mask or ""), 0.3)
    probabilities = capture.probabilities(key)
    scores = query @ key.repeat_interleave(2, dim=1).mT * 0.3
    if mask != "additive":
        allowed = near if mask else torch.ones(10, 10, dtype=torch.bool).tril()
        expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    else:
        expected = (scores + biased).softmax(-1)
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(capture.attend(key, value), expected @ value.repeat_interleave(2, dim=1))
    assert torch.equal(capture.probabilities(key, 3), probabilities[:, :, ::3])


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
