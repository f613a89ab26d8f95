"""The loss that `fuse` reports is that of the folder that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import headfuse
from headfuse.config.fuse import load_config
from headfuse.models.source import Source
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("layout", ["decoupled", "latent"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gptj", "opt"])
def test_the_loss_on_held_out_text(tmp_path: Path, family: str, layout: str) -> None:
    model = tiny_model(tmp_path / "model", family)
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 8, "sequence_length": 32}
    config = load_config(
        None, {"budget": {"total": 0.5}, "preset": "fast", "layout": layout, "calibration": calibration}
    )
    result = headfuse.fuse(model, config, output=tmp_path / "out", device="cpu")
    windows = Source.open(model).calibration_text(config.calibration, config.seed).held_out
    with torch.no_grad():
        logits = headfuse.load(tmp_path / "out", device="cpu")(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)
    assert result.stages[0].held_out == pytest.approx(loss.tolist(), abs=1e-4)
