"""Options of `fuse`: the text held out."""

from __future__ import annotations

from pathlib import Path

import pytest

import headfuse
from headfuse.config.fuse import FuseConfig
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("samples", "share", "held_out"),
    [(2, None, 0), (16, None, 4), (40, None, 8), (40, 0.5, 20), (4, 0.99, 3), (4, 0.0, 0)],
)
def test_a_quarter_is_held_out_and_never_much(tmp_path: Path, samples: int, share: float | None, held_out: int) -> None:
    calibration = {"samples": samples, "sequence_length": 16, "held_out": share}
    config = FuseConfig.model_validate({"budget": {"total": "0.5"}, "preset": "fast", "calibration": calibration})
    result = headfuse.fuse(str(tiny_model(tmp_path / "model", "llama")), config, output=tmp_path / "out")
    assert len(result.held_out_before) == len(result.held_out_after) == held_out
