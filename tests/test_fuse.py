"""The command `fuse` and the packaged configs."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run, tiny_model

import headfuse
from headfuse.config.fuse import FuseConfig


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


@pytest.mark.parametrize("name", ["headfuse-25", "headfuse-50", "gqa-25", "dha-paper-25", "dha-paper-50", "dha-small"])
def test_packaged_configs_are_those_of_the_repository(name: str) -> None:
    from headfuse.config.fuse import load_config

    root = Path(__file__).parent.parent
    assert load_config(str(root / f"configs/{name}.yaml"), {}) == load_config(name, {})


@pytest.mark.parametrize(
    ("samples", "share", "held_out"),
    [(2, None, 0), (16, None, 4), (40, None, 8), (40, 0.5, 20), (4, 0.99, 3), (4, 0.0, 0)],
)
def test_a_quarter_is_held_out_and_never_much(tmp_path: Path, samples: int, share: float | None, held_out: int) -> None:
    calibration = {"samples": samples, "sequence_length": 16, "held_out": share}
    config = FuseConfig.model_validate({"budget": {"total": "0.5"}, "preset": "fast", "calibration": calibration})
    result = headfuse.fuse(str(tiny_model(tmp_path / "model", "llama")), config, output=tmp_path / "out")
    assert len(result.held_out_before) == len(result.held_out_after) == held_out
