"""What a run refuses, its dry run does, and both write nothing."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headfuse.cli.app import app
from headfuse.models.source import Source
from tests.support.commands import run
from tests.support.model_edits import edit_json, edit_tensors

FEW = ("--samples", 4, "--sequence-length", 32)


def too_long(place: Path) -> None:
    edit_json(place / "model/config.json", max_position_embeddings=16)


def shapes(place: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(place / "model", lambda tensors: tensors.update({name: tensors[name][:8].clone()}))


def closed(place: Path) -> None:
    (place / "file").write_text("")


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no weights": (lambda p: (p / "model/model.safetensors").unlink(), ()),
    "a tensor is missing": (lambda p: edit_tensors(p / "model", lambda t: t.pop("model.norm.weight")), ()),
    "a tensor has another shape": (shapes, ()),
    "no text": (lambda p: (p / "text.txt").unlink(), ()),
    "empty text": (lambda p: (p / "text.txt").write_text(""), ()),
    "short text": (lambda p: (p / "text.txt").write_text("the head"), ()),
    "no tokenizer": (lambda p: (p / "model/tokenizer.json").unlink(), ()),
    "windows beyond the positions": (too_long, ()),
    "an output that exists": (lambda p: (p / "out").mkdir(), ()),
    "something where the output is built": (lambda p: (p / "out.partial").write_text(""), ()),
    "an output inside a file": (closed, ("-o", "file/out")),
    "an output with too long a name": (lambda p: None, ("-o", "x" * 250)),
    "an output inside the model": (lambda p: None, ("-o", "model/out")),
    "a device that is not there": (lambda p: None, ("--device", "mps")),
    "a budget too small": (lambda p: None, ("--budget", "0.01")),
    "a plan that is none": (lambda p: (p / "plan.json").write_text("{"), ("--plan", "plan.json")),
    "gates that are none": (lambda p: (p / "gates.yaml").write_text("max_nll: [1"), ("--gate", "gates.yaml")),
    "a layout that does not fit": (
        lambda p: edit_json(p / "model/config.json", model_type="mistral", sliding_window=9), ("--layout", "layerwise"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_dry_run_refuses_what_the_run_does(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, options = REFUSED[name]
    damage(model.parent)
    monkeypatch.chdir(tmp_path)
    output = () if "-o" in options else ("-o", "out")
    line = ["fuse", "model", "--data", "text.txt", *map(str, FEW), *output, *options]
    before = sorted(tmp_path.rglob("*"))
    dry, real = (CliRunner().invoke(app, [*line, *more]) for more in (["--dry-run"], []))
    assert dry.exit_code == real.exit_code == 1
    errors = [result.output[result.output.index("error:") :] for result in (dry, real)]
    assert errors[0] == errors[1]
    assert "unexpected" not in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_writes_nothing_and_ends_well(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "new" / "out"
    document = json.loads(
        run("fuse", model, "--data", tmp_path / "text.txt", *FEW, "-o", out, "--dry-run", "--json").splitlines()[-1]
    )
    assert document["dry_run"]
    assert document["output"] == str(out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    data = ("--data", tmp_path / "text.txt", *FEW, "-o", tmp_path / "out")
    assert "No space left" in run("fuse", model, *data, "--dry-run", code=1)
    assert "free some space" in run("fuse", model, *data, code=1)


def test_a_dry_run_of_a_resumed_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other options than those of the interrupted run are refused in both."""

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    data = ("--data", tmp_path / "text.txt", *FEW, "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("headfuse.conversion.convert.write_beside_weights", fail)
        run("fuse", model, *data, "--budget", 0.5, code=130)
    assert "--resume" in run("fuse", model, *data, "--budget", 0.5, "--dry-run", code=1)
    run("fuse", model, *data, "--budget", 0.5, "--dry-run", "--resume")
    messages = [run("fuse", model, *data, "--budget", 0.25, "--resume", *more, code=1) for more in (("--dry-run",), ())]
    refusals = [message[message.index("error: ") :] for message in messages]  # after the stages of a run
    assert refusals[0] == refusals[1]
    assert "differs in config" in refusals[0]


def test_warnings_are_no_errors(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model as it should be is opened in silence."""
    with caplog.at_level(logging.INFO):
        Source.open(str(model))
    assert not caplog.records
