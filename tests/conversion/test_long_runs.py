"""Before a conversion of hours: how long, and which preset takes less; the run goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from headfuse.conversion import cost
from headfuse.conversion.long_runs import duration
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

OPTIONS = ("--budget", 0.5, "--samples", 64, "--sequence-length", 16)


def advice(model: Path, monkeypatch: pytest.MonkeyPatch, hours: float, *options: object) -> str | None:
    """What `--dry-run` says where the options given take so many hours."""
    monkeypatch.undo()
    line = ("fuse", model, "--dry-run", "--json", "--data", model.parent / "text.txt", *OPTIONS, *options)
    with monkeypatch.context() as patch:
        patch.setattr(cost, "measured_speed", lambda device: 1e9)
        work = (json.loads(run(*line).splitlines()[-1])["estimate"]["seconds"] - 5) * 1e9
    monkeypatch.setattr(cost, "measured_speed", lambda device: work / (hours * 3600))
    found: str | None = json.loads(run(*line).splitlines()[-1])["advice"]
    return found


def test_a_short_run_needs_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model")
    assert advice(model, monkeypatch, 0.9) is None


def test_a_dry_run_measures_the_machine_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two measurements on a busy machine said two times in one answer."""
    speeds = iter((100.0,))
    monkeypatch.setattr(cost, "measured_speed", lambda device: next(speeds))
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
    monkeypatch.setattr("headfuse.conversion.convert.measured_speed", lambda device: 100.0)
    with caplog.at_level(logging.WARNING):
        fuse(model, tmp_path / "fused", "--budget", 0.5, "--preset", "fast")
    assert (tmp_path / "fused/model.safetensors").exists()
    assert "on this machine; " in caplog.text


def test_durations() -> None:
    assert [duration(s) for s in (5, 119, 120, 5399, 9552)] == ["5 s", "119 s", "2 min", "90 min", "2.7 h"]
