"""The commands on a device: what they compute is what they compute on a CPU, up to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headfuse.checkpoint.plan_file import read_plan
from headfuse.training.accelerator import make_accelerator
from headfuse.training.uptrain import uptrain
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

KINDS = ("llama", "qwen3", "phi", "gpt2", "bloom")
"""Keys with RoPE, behind a norm, rotated in part, packed, and with a bias by distance."""


def assert_close(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-3), name


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
        ("--preset", "fast", "--allocator", "taylor"),
        ("--preset", "fast", "--allocator", "shapley"),
    ],
    ids=["balanced", "gqa", "align", "taylor", "shapley"],
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
