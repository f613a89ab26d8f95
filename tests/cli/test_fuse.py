"""The command `fuse`: bad budgets and bad folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import run
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize(("budget", "code"), [("0", 2), ("-1", 2), ("1.5", 2), ("nan", 2), ("abc", 2), ("0.1", 1)])
def test_bad_budgets(tmp_path: Path, budget: str, code: int) -> None:
    model = tiny_model(tmp_path / "model")
    output = run("fuse", model, f"--budget={budget}", "-o", tmp_path / "out", code=code)
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in run("fuse", tmp_path / "nothing", code=1)


def test_truncated_weights(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "complete" in run("fuse", model, "-o", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()
