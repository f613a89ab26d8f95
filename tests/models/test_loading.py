"""The dtype that a model is loaded in."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from headfuse.checkpoint.reader import Checkpoint
from headfuse.models.loading import loaded_dtype
from tests.support.model_edits import edit_tensors
from tests.support.tiny_models import tiny_model


def test_the_stored_dtype_counts_not_that_of_the_config(tmp_path: Path) -> None:
    """transformers takes that of config.json, and would round weights that nothing trains."""
    model = tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert loaded_dtype(Checkpoint(model), "cuda") == torch.float32
    assert loaded_dtype(Checkpoint(model), "cpu") == torch.float32
    edit_tensors(model, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}))
    assert loaded_dtype(Checkpoint(model), "cuda") == "auto"
