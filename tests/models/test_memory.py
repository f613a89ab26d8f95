"""What lets large models through: weights read twice and written once, one layer in memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headfuse.checkpoint import plan_file
from headfuse.checkpoint.reader import Checkpoint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.layouts import LAYOUTS
from headfuse.models import heap
from headfuse.models.attention import AttentionWeights
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model


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
    """The similarity of the weights is measured while the survey has them; comparing two plans is a walk of its own."""
    model = tiny_model(tmp_path / "model", layers=3)
    read = count_reads(monkeypatch, model)
    text = ("--data", tmp_path / "text.txt", "--samples", 4, "--sequence-length", 32)
    run("analyze", model, "--budget", "0.5", "--preset", "fast", "--allocator", "sensitivity", *text)
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


HUGE_PAGES = """
from headfuse.models.heap import use_huge_pages
use_huge_pages()
import torch
tensor = torch.ones(2**26, dtype=torch.uint8)
with open("/proc/self/smaps_rollup") as maps:
    print(next(int(line.split()[1]) for line in maps if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(
    not heap._HUGE_PAGES.exists() or "[madvise]" not in heap._HUGE_PAGES.read_text(),
    reason="the system gives no huge pages on request",
)
@pytest.mark.parametrize(("decided", "least"), [({}, 32 * 1024), ({"THP_MEM_ALLOC_ENABLE": "0"}, 0)])
def test_large_tensors_lie_in_huge_pages(decided: dict[str, str], least: int) -> None:
    """Half of 64 MiB at least, as free memory may be in pieces; none where the user wants none."""
    free = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", HUGE_PAGES]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=free | decided)
    assert int(result.stdout) >= least
    assert bool(least) == bool(int(result.stdout))


def test_commands_ask_for_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headfuse.models.heap._HUGE_PAGES", tmp_path / "enabled")
    model = tiny_model(tmp_path / "model")
    for text, asked in (("always [madvise] never", "1"), ("[always] madvise never", None)):
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")  # put back after the test
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
        (tmp_path / "enabled").write_text(text)
        fuse(model, tmp_path / "out", "--budget", "0.5", "--dry-run")
        assert os.environ.get("THP_MEM_ALLOC_ENABLE") == asked


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
