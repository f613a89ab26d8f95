"""The refinement of a fused model: the gradient is right, the held-out loss decides, nothing else changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import headfuse
from headfuse.checkpoint.reader import Checkpoint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.conversion import refine as refine_model
from headfuse.conversion.refine import Adam, Targets
from headfuse.models.decoder_layers import DecoderLayers
from headfuse.models.families import ARCHITECTURES
from headfuse.models.source import Source
from headfuse.models.states import States, model_states
from headfuse.models.streamed import StreamedModel
from headfuse.training.objective import Objective
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "mha-6m"
TEXT = ("--samples", 24, "--sequence-length", 128)


@pytest.mark.parametrize("layout", ["decoupled", "gqa", "latent", "latent --cross-layer 1"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_layer_by_layer_is_the_whole_model_at_once(
    tmp_path: Path, model_type: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of the streamed refinement are steps of torch's Adam on the loss of the whole model."""
    model = tiny_model(tmp_path / "model", model_type)
    fuse(model, tmp_path / "out", "--layout", *layout.split(), "--budget", "0.5", "--preset", "fast")
    windows = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(3))
    source, fused = headfuse.load(model), headfuse.load(tmp_path / "out")
    with torch.no_grad():
        targets = Targets(windows, model_states(source, windows).last)
    monkeypatch.setattr(refine_model, "FINAL_LEARNING_RATE", 1.0)
    monkeypatch.setattr(refine_model, "WARMUP_STEPS", 1)

    opened, arch = Source.open(str(model)), ARCHITECTURES[model_type]
    streamed = StreamedModel(opened.checkpoint, opened.config, torch.device("cpu"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "state").mkdir()
    writer = SafetensorsWriter(tmp_path / "state", {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()})
    for name, tensor in stored.items():
        writer.write(name, tensor)
    layers = DecoderLayers.of_config(fused.config.to_dict(), arch, writer, streamed.layers)
    optimizer = Adam(tmp_path / "state", {name: writer.shapes[name] for name in layers.attention_weights(range(2))})
    for name, weight in optimizer.weights.items():
        weight.copy_(writer.read(name))
    order = refine_model._shuffled(len(windows), 0)
    refine_model.refine_model(streamed, layers, optimizer, targets, 2.0, 0, lambda done, total: None)

    fused.requires_grad_(False)
    named = dict(fused.named_parameters())
    trained = {name: named[name].requires_grad_(True) for name in optimizer.weights}
    rate = refine_model.learning_rate(fused.get_output_embeddings().weight.shape[1])
    whole = torch.optim.Adam(trained.values(), lr=rate, betas=refine_model.BETAS, eps=refine_model.EPSILON)
    objective = Objective(fused, fused.get_output_embeddings())
    for _, index in zip(range(6), order, strict=False):
        objective(windows[index : index + 1], States(targets.hidden[index : index + 1])).backward()
        whole.step()
        whole.zero_grad()
    assert trained.keys() == {name for name in stored if ".self_attn." in name}
    for name, parameter in trained.items():
        moved = (parameter - stored[name]).abs().max()
        assert moved > rate
        # a gradient of nearly zero has no certain sign, and Adam moves by the sign
        close = (optimizer.weights[name] - parameter).abs() < 0.02 * moved
        assert close.float().mean() > 0.99, name


def fuse_example(out: Path, *options: object) -> dict[str, Any]:
    """`headfuse fuse --json` of the bundled trained model on little text, in layout decoupled."""
    options = ("--layout", "decoupled", "--budget", "1/8", *options)
    lines = run("fuse", EXAMPLE, "-o", out, "--json", *TEXT, *options).splitlines()
    document: dict[str, Any] = json.loads(lines[-1])
    return document


def test_refinement_lowers_the_held_out_loss(tmp_path: Path) -> None:
    """Only the attention weights change; what the document says is what the folder holds."""
    document = fuse_example(tmp_path / "out", "--preset", "best")
    closed_form, refined = document["stages"]
    assert (closed_form["name"], refined["name"], refined["kept"]) == ("closed form", "refined", True)
    assert refined["nll"] < closed_form["nll"] - 0.02
    assert document["nll"]["after"] == refined["nll"]
    assert not (tmp_path / "out" / "state").exists()
    before, after = Checkpoint(EXAMPLE), Checkpoint(tmp_path / "out")
    for name in before.shapes:
        if ".self_attn." not in name:
            assert torch.equal(before.read(name), after.read(name)), name


def test_weights_and_moments_lie_in_memory_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else in mapped files; both give the same bytes, and a dry run counts the memory."""
    mapped = refine_model.mapped_tensor
    parts, needed = dict[str, set[str]](), dict[str, int]()
    for name, free in (("memory", 2**40), ("files", 0)):
        monkeypatch.setattr("headfuse.models.placement.free_host_bytes", lambda free=free: free)
        seen = parts.setdefault(name, set())
        monkeypatch.setattr(
            refine_model, "mapped_tensor", lambda path, *of, seen=seen: (seen.add(path.suffix), mapped(path, *of))[1]
        )
        options = ("--allocator", "uniform", "--preset", "balanced", "--samples", 6)
        fuse_example(tmp_path / name, *options)
        needed[name] = fuse_example(tmp_path / "dry", *options, "--dry-run")["estimate"]["memory_bytes"]
    assert parts == {"memory": {".weight"}, "files": {".weight", ".mean", ".square"}}
    memory, files = Checkpoint(tmp_path / "memory"), Checkpoint(tmp_path / "files")
    assert all(torch.equal(memory.read(name), files.read(name)) for name in memory.shapes)
    source = Checkpoint(EXAMPLE)
    attention = sum(math.prod(shape) for name, shape in source.shapes.items() if ".self_attn." in name)
    assert needed["memory"] - needed["files"] == 3 * 4 * attention


@pytest.mark.long
def test_worse_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are those of the closed form when the held-out loss rose."""
    fuse_example(tmp_path / "fast", "--allocator", "uniform", "--preset", "fast")
    monkeypatch.setattr(refine_model, "LEARNING_RATE", 1e3)
    document = fuse_example(tmp_path / "best", "--allocator", "uniform", "--preset", "best")
    assert document["stages"][1]["kept"] is False
    assert document["nll"]["after"] == document["stages"][0]["nll"]
    fast, best = Checkpoint(tmp_path / "fast"), Checkpoint(tmp_path / "best")
    assert all(torch.equal(fast.read(name), best.read(name)) for name in fast.shapes)


@pytest.mark.parametrize("options", [("--budget", "1"), ("--method", "mean")])
def test_what_is_not_refined(tmp_path: Path, options: tuple[str, ...]) -> None:
    """A lossless conversion has nothing to gain, and published baselines stay what they are."""
    document = fuse_example(tmp_path / "out", *options, "--preset", "best")
    assert [stage["name"] for stage in document["stages"]] == ["closed form"]


def test_kept_layers_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "keep.yaml").write_text(
        "layout: decoupled\nbudget: {total: 0.42, keep_layers: [4, 5], allocator: uniform}\n"
    )
    lines = run("fuse", EXAMPLE, "-o", tmp_path / "out", "--json", "-c", tmp_path / "keep.yaml", *TEXT).splitlines()
    assert [stage["name"] for stage in json.loads(lines[-1])["stages"]] == ["closed form", "refined"]
    before, after = Checkpoint(EXAMPLE), Checkpoint(tmp_path / "out")
    for name in before.shapes:
        if name.startswith(("model.layers.4.", "model.layers.5.")):
            assert torch.equal(before.read(name), after.read(name)), name


@pytest.mark.long
def test_an_interrupted_refinement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within the refinement, or while its result is written: the end is the same."""
    options = ("--allocator", "uniform", "--preset", "best")
    whole = fuse_example(tmp_path / "whole", *options)
    writes, original = 0, SafetensorsWriter.write

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def write(self: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal writes
        writes += "self_attn" in name
        if writes == 5:  # the layers are done, these are refined weights
            raise KeyboardInterrupt
        original(self, name, tensor)

    streamed: Callable[..., None] = refine_model.refine_model
    line = ("fuse", EXAMPLE, "-o", tmp_path / "out", "--layout", "decoupled", "-b", "1/8", *TEXT, *options)
    with monkeypatch.context() as patch:
        patch.setattr("headfuse.conversion.refine.refine_model", lambda *args: streamed(*args[:6], stop))
        run(*line, code=130)
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", write)
        run(*line, "--resume", code=130)
    assert not (tmp_path / "out").exists()
    resumed = fuse_example(tmp_path / "out", *options, "--resume")
    assert resumed["stages"] == whole["stages"]
    first, second = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "out")
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.shapes)


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_products_in_bfloat16_give_nearly_the_same_model(tmp_path: Path, preset: str) -> None:
    model = tiny_model(tmp_path / "model")
    found = [
        fuse(model, tmp_path / dtype, "--budget", "0.5", "--preset", preset, "--compute-dtype", dtype)
        for dtype in ("float32", "bfloat16")
    ]
    assert found[0]["nll"]["after"] == pytest.approx(found[1]["nll"]["after"], abs=2e-2)
    weights = [load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16")]
    assert {name: tensor.dtype for name, tensor in weights[0].items()} == {n: t.dtype for n, t in weights[1].items()}
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "highest"), ("bfloat16", "medium")])
def test_the_head_multiplies_as_the_layers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, precision: str
) -> None:
    seen, logits = set[str](), StreamedModel.logits

    def watched(self: StreamedModel, hidden: torch.Tensor) -> torch.Tensor:
        found = logits(self, hidden)
        assert found.dtype == torch.float32
        seen.add(torch.get_float32_matmul_precision())
        return found

    monkeypatch.setattr(StreamedModel, "logits", watched)
    monkeypatch.setattr(refine_model, "NEGLIGIBLE_NLL", -1.0)  # a tiny model may lose nothing
    model, own = tiny_model(tmp_path / "model"), ("--layout", "decoupled", "--allocator", "uniform")
    fuse(model, tmp_path / "out", "--budget", "0.5", "--preset", "balanced", *own, "--compute-dtype", dtype)
    assert seen == {precision}
    assert torch.get_float32_matmul_precision() == "highest"
