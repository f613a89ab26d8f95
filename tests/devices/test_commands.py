"""The commands on a device: what they compute is what they compute on a CPU, up to rounding."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headfuse.checkpoint.plan_file import read_plan
from headfuse.models import source_layer
from headfuse.models.capture import AttentionCapture, HostCapture
from headfuse.training.accelerator import make_accelerator
from headfuse.training.uptrain import uptrain
from tests.support.commands import fuse, run
from tests.support.model_outputs import logits
from tests.support.tiny_models import tiny_model

KINDS = ("llama", "qwen3", "phi", "gpt2", "bloom")
"""Keys with RoPE, behind a norm, rotated in part, packed, and with a bias by distance."""


def assert_close(one: Path, other: Path) -> None:
    """The same function: a fused channel and its negative are as good as each other, and devices choose differently."""
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("family", KINDS)
def test_fuse_writes_what_it_writes_on_a_cpu(family: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", family)
    for device in ("cpu", "cuda"):
        fuse(model, tmp_path / device, "--budget", "0.5", "--preset", "fast", "--device", device)
    assert read_plan(tmp_path / "cpu").layers == read_plan(tmp_path / "cuda").layers
    assert_close(tmp_path / "cpu", tmp_path / "cuda")


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "balanced"),
        ("--preset", "fast", "--layout", "gqa"),
        ("--preset", "fast", "--layout", "layerwise", "--method", "align"),
        ("--preset", "balanced", "--layout", "latent", "--cross-layer", "1"),
        ("--preset", "fast", "--allocator", "taylor"),
        ("--preset", "fast", "--allocator", "shapley"),
    ],
    ids=["balanced", "gqa", "align", "across layers", "taylor", "shapley"],
)
def test_every_way_to_fuse_works(options: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    found = [fuse(model, tmp_path / d, "--budget", "0.5", "--device", d, *options) for d in ("cpu", "cuda")]
    assert found[0]["nll"]["after"] == pytest.approx(found[1]["nll"]["after"], abs=1e-2)


def test_analyze_and_eval_work(tmp_path: Path) -> None:
    model, text = tiny_model(tmp_path / "model"), tmp_path / "text.txt"
    sizes = "--data", text, "--samples", 4, "--sequence-length", 32
    run("analyze", model, *sizes, "--device", "cuda")
    figures = [
        json.loads(run("eval", model, *sizes, "--baseline", model, "--device", device, "--json").splitlines()[-1])
        for device in ("cpu", "cuda")
    ]
    assert figures[0]["model"]["nll"] == pytest.approx(figures[1]["model"]["nll"], abs=1e-3)


def test_uptrain_on_the_device_and_then_on_the_cpu(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    found = [
        uptrain(
            model, data=str(tmp_path / "text.txt"), tokens=256, batch_size=2, sequence_length=32, validation_windows=2,
            teacher=str(model), device=device, output=tmp_path / device,
        )
        for device in ("cuda", "cpu")
    ]  # fmt: skip
    assert found[0].nll_after == pytest.approx(found[1].nll_after, abs=0.05)  # one is in bfloat16


def test_emulated_bfloat16_is_not_trained_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert make_accelerator("cuda", unused=False).mixed_precision == "no"


def test_a_dry_run_says_what_stays_on_the_device(tmp_path: Path) -> None:
    model, text = tiny_model(tmp_path / "model"), tmp_path / "text.txt"
    options = "--data", text, "--samples", 4, "--sequence-length", 16, "--dry-run", "--device", "cuda", "--json"
    found = [
        json.loads(run("fuse", model, *options, "--placement", placement).splitlines()[-1])["estimate"]["device"]
        for placement in ("auto", "streamed", "host")
    ]
    assert [each["placement"] for each in found] == ["resident", "streamed", "host"]
    assert found[0]["memory_bytes"] > found[1]["memory_bytes"] > found[2]["memory_bytes"] > 0


def test_a_placement_changes_no_weight(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", dtype="float16")
    for placement in ("resident", "streamed", "host"):
        options = "--budget", "0.5", "--preset", "balanced", "--device", "cuda", "--placement", placement
        fuse(model, tmp_path / placement, *options)
        assert_close(tmp_path / "resident", tmp_path / placement)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_captures_without_room_lie_on_the_host(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = tiny_model(tmp_path / "model", family), list[AttentionCapture]()
    options = "--budget", "0.5", "--preset", "fast", "--device", "cuda"
    fuse(model, tmp_path / "device", *options)
    monkeypatch.setattr(source_layer, "has_room", lambda device, size: False)

    def keep(capture: AttentionCapture) -> AttentionCapture:
        kept.append(HostCapture(capture))
        return kept[-1]

    monkeypatch.setattr(source_layer, "HostCapture", keep)
    fuse(model, tmp_path / "host", *options)
    assert {capture.key.device.type for capture in kept} == {"cuda"}
    assert {tensor.device.type for c in kept for tensor in vars(c)["host"].values() if tensor is not None} == {"cpu"}
    assert_close(tmp_path / "device", tmp_path / "host")


@pytest.mark.parametrize("trained", ["attention", "lora"])
def test_frozen_matrices_stay_as_they_are_stored(trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dtypes = tiny_model(tmp_path / "model", dtype="float16"), dict[str, torch.dtype]()
    module = sys.modules["headfuse.training.uptrain"]
    own = module.make_optimizer

    def make_optimizer(student: Any, *args: Any) -> Any:
        dtypes.update({name: parameter.dtype for name, parameter in student.named_parameters()})
        return own(student, *args)

    monkeypatch.setattr(module, "make_optimizer", make_optimizer)
    found = [
        uptrain(
            model, data=str(tmp_path / "text.txt"), tokens=256, batch_size=2, sequence_length=32, validation_windows=2,
            teacher=str(model), train=trained, device=device, output=tmp_path / device,
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    half = {name for name, dtype in dtypes.items() if dtype == torch.float16}
    linear = ("q_proj", "k_proj", "v_proj", "o_proj") if trained == "lora" else ()
    assert half == {name for name in dtypes if any(x in name for x in ("mlp", *linear)) and "lora" not in name}
    assert found[0].nll_before == pytest.approx(found[1].nll_before, abs=1e-2)
    assert found[0].nll_after == pytest.approx(found[1].nll_after, abs=5e-2)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "cuda"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "self_attn" in name}
