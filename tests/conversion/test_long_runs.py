"""Before a conversion of hours: how long, and which preset takes less; the run goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from headfuse.conversion import long_runs
from headfuse.conversion.long_runs import duration
from headfuse.models import speed
from headfuse.models.speed import measured_speed
from tests.support import tiny_models
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

OPTIONS = ("--budget", 0.5, "--samples", 64, "--sequence-length", 16)


def machine_of(patch: pytest.MonkeyPatch, float32: float, bfloat16: float = 1.0) -> None:
    """Let the machine multiply at these speeds."""
    for module in (speed, long_runs):
        patch.setattr(module, "measured_speed", lambda device, dtype: float32 if dtype == "float32" else bfloat16)


def advice(
    model: Path, monkeypatch: pytest.MonkeyPatch, hours: float, *options: object, narrower: float = 0.01
) -> str | None:
    """What `--dry-run` says where the options given take so many hours, and bfloat16 is so many times as fast."""
    line = ("fuse", model, "--dry-run", "--json", "--data", model.parent / "text.txt", *OPTIONS, *options)
    with monkeypatch.context() as patch:
        machine_of(patch, 1e9, narrower * 1e9)
        work = (json.loads(run(*line).splitlines()[-1])["estimate"]["seconds"] - 5) * 1e9
        rate = work / (hours * 3600)
        machine_of(patch, rate, narrower * rate)
        found: str | None = json.loads(run(*line).splitlines()[-1])["advice"]
    return found


def test_a_short_run_needs_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model")
    assert advice(model, monkeypatch, 0.9) is None


def test_a_dry_run_measures_the_machine_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two measurements on a busy machine said two times in one answer."""
    speeds = {"float32": iter((100.0,)), "bfloat16": iter((100.0,))}
    for module in (speed, long_runs):
        monkeypatch.setattr(module, "measured_speed", lambda device, dtype: next(speeds[dtype]))
    model = tiny_model(tmp_path / "model")
    line = ("fuse", model, "--dry-run", "--json", "--data", tmp_path / "text.txt", *OPTIONS)
    said = json.loads(run(*line).splitlines()[-1])
    assert said["advice"].startswith(f"about {duration(said['estimate']['seconds'])} on this machine")


def test_the_preset_that_fits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model")
    said = advice(model, monkeypatch, 1.6, "--preset", "best")
    assert said is not None
    assert said.startswith("about 1.6 h")
    assert "--preset balanced" in said or "--preset fast takes" in said
    said = advice(model, monkeypatch, 10, "--preset", "balanced")
    assert said is not None
    assert "--preset fast" in said
    said = advice(model, monkeypatch, 100, "--preset", "fast", "--samples", 16)
    assert said is not None
    assert "GPU" in said


def test_a_long_run_is_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(tmp_path / "model")
    machine_of(monkeypatch, 100.0)
    with caplog.at_level(logging.WARNING):
        fuse(model, tmp_path / "fused", "--budget", 0.5, "--preset", "fast")
    assert (tmp_path / "fused/model.safetensors").exists()
    assert "on this machine; " in caplog.text


def test_bfloat16_is_named_where_it_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model")
    options = ("--preset", "best", "--layout", "gqa")
    said = advice(model, monkeypatch, 1.2, *options, narrower=4.0)
    assert said is not None
    assert "; --compute-dtype bfloat16 takes about" in said
    assert "--preset" not in said  # it loses nothing, and is enough
    said = advice(model, monkeypatch, 20, *options, narrower=4.0)
    assert said is not None
    assert "; --compute-dtype bfloat16 takes about" in said
    assert "; --compute-dtype bfloat16 --preset fast --samples 16 takes about" in said
    said = advice(model, monkeypatch, 20, *options, narrower=1.1)
    assert said is not None
    assert "bfloat16" not in said
    said = advice(model, monkeypatch, 20, *options, "--compute-dtype", "bfloat16", narrower=4.0)
    assert said is not None
    assert "bfloat16" not in said


def test_the_estimate_knows_the_dtype_of_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(monkeypatch, 1e6, 4e6)
    model = tiny_model(tmp_path / "model")
    line = ("fuse", model, "--dry-run", "--json", "--data", tmp_path / "text.txt", *OPTIONS)
    took = [
        json.loads(run(*line, "--compute-dtype", dtype).splitlines()[-1])["estimate"]["seconds"]
        for dtype in ("float32", "bfloat16")
    ]
    assert took[0] / 4 < took[1] < took[0]


def test_the_estimate_counts_the_refinements_logits_in_that_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large vocabulary they are most of a step."""
    machine_of(monkeypatch, 1e6, 4e6)
    monkeypatch.setattr(tiny_models, "VOCABULARY", 4096)
    model = tiny_model(tmp_path / "model")
    line = ("fuse", model, "--dry-run", "--json", "--data", tmp_path / "text.txt", "--layout", "gqa", *OPTIONS)
    took = {
        (preset, dtype): json.loads(run(*line, "--preset", preset, "--compute-dtype", dtype).splitlines()[-1])[
            "estimate"
        ]["seconds"]
        for preset in ("fast", "best")
        for dtype in ("float32", "bfloat16")
    }
    refined = {dtype: took["best", dtype] - took["fast", dtype] for dtype in ("float32", "bfloat16")}
    assert refined["bfloat16"] < 0.5 * refined["float32"]


def test_a_slow_dtype_of_products_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine_of(monkeypatch, 1e10, 1e8)
    model = tiny_model(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        fuse(model, tmp_path / "fused", "--budget", 0.5, "--preset", "fast", "--compute-dtype", "bfloat16")
    assert "products in bfloat16 take 100.0 times as long as in float32" in caplog.text


def test_speeds_are_measured() -> None:
    assert 1e6 < measured_speed(torch.device("cpu"), "float32") < 1e16
    assert measured_speed(torch.device("cpu"), "bfloat16") > 0


def test_durations() -> None:
    assert [duration(s) for s in (5, 119, 120, 5399, 9552)] == ["5 s", "119 s", "2 min", "90 min", "2.7 h"]
