"""Folders that an earlier version wrote still load, and every command takes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.commands import run
from tests.support.model_outputs import logits

OLDER = sorted((Path(__file__).parent.parent / "fixtures").iterdir())
LAYOUTS = ("decoupled", "layerwise", "gqa")


@pytest.fixture(params=[f"{version.name}/{layout}" for version in OLDER for layout in LAYOUTS])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a folder beside its source and text, as it lay when it was written."""
    version, layout = request.param.split("/")
    place = shutil.copytree(Path(__file__).parent.parent / "fixtures" / version, tmp_path / version)
    return place / layout


def test_it_computes_what_it_computed_then(folder: Path) -> None:
    then = load_file(folder.parent / "logits.safetensors")[folder.name]
    torch.testing.assert_close(logits(folder)[:, -1], then, rtol=1e-4, atol=1e-4)


def test_every_command_takes_it(folder: Path, tmp_path: Path) -> None:
    text = ("--data", folder.parent / "text.txt", "--sequence-length", 32)
    source = folder.parent / "source"
    evaluated = json.loads(run("eval", folder, "--baseline", source, *text, "--samples", 2, "--json").splitlines()[-1])
    assert evaluated["comparison"]["kv_ratio"] == 0.5
    trained = ("--teacher", source, "--tokens", 64, "--batch-size", 1, "--validation-windows", 1)
    run("uptrain", folder, *text, *trained, "-o", tmp_path / "trained", "-q")
    assert (tmp_path / "trained" / "model.safetensors").exists()
    run("report", folder, "-o", tmp_path / "report.html")
    if folder.name != "decoupled":  # its rotary slots have no stock class
        other = {"gqa": "layerwise", "layerwise": "gqa"}[folder.name]
        run("export", folder, "--to", other, "-o", tmp_path / "exported")
