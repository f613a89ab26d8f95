"""Trackers, and the live line."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headfuse.cli.app import app
from headfuse.errors import ConfigError, MissingExtraError
from tests.training.runs import losses, train


def test_tensorboard(fused: Path, data: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(fused, data, trackers=["tensorboard"], tracker_folder=tmp_path / "runs")
    board = EventAccumulator(str(tmp_path / "runs" / "fused-uptrained" / "headfuse"))
    board.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in board.Scalars("loss")] == losses(result.output)
    assert [e.step for e in board.Scalars("validation_nll")] == [5, 10, 12]
    assert not list(result.output.rglob("events*"))  # their names hold that of the machine


def test_wandb_offline(fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    train(fused, data, trackers=["wandb"])
    assert list((tmp_path / "runs" / "fused-uptrained").rglob("run-*.wandb"))
    assert not (tmp_path / "wandb").exists()


def test_unknown_and_missing_trackers(fused: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="choose from tensorboard, wandb"):
        train(fused, data, trackers=["tensorbord"])
    monkeypatch.setattr("headfuse.training.accelerator.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="is not installed") as caught:
        train(fused, data, trackers=["wandb"])
    assert "pip install wandb" in str(caught.value)


def test_live_line_is_on_terminals_alone(fused: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--data", data, "--tokens", "64", "--sequence-length", "16", "--device", "cpu", "--overwrite"]
    command = ["uptrain", str(fused), *options]
    plain = CliRunner().invoke(app, command).stderr
    assert "\x1b" not in plain
    assert "training: step 1 of " in plain
    assert "tokens/s, left" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    for place in ("headfuse.reporting.progress", "headfuse.cli.uptrain"):  # a runner's stream is no terminal
        monkeypatch.setattr(f"{place}.is_live", lambda console: console.is_terminal and not console.quiet)
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", CliRunner().invoke(app, command, color=True).stderr)
    assert re.search(r"loss \d\.\d+, validation NLL \d\.\d+ [\d,]+ tokens/s, left", shown)
    assert "validation NLL" not in CliRunner().invoke(app, [*command, "--quiet"]).stderr
