"""Folders in vLLM, as far as it goes without a GPU: its config, its model inspection, its own model code."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import fuse
from tests.support.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("HEADFUSE_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no environment with vLLM: make it with ./scripts/check_vllm.sh")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_vllm_reads_every_layout_and_computes_the_same(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family, layers=3)  # as many channels in all heads as in the hidden states
    config = json.loads((model / "config.json").read_text())
    config.update(sliding_window=None, use_sliding_window=False)
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    counts = {"decoupled": "[2, 4, 1], value_heads: [3, 1, 2]", "layerwise": "[2, 4, 1], value_heads: [2, 4, 1]"}
    for layout, heads in counts.items():
        (tmp_path / "options.yaml").write_text(f"budget: {{key_heads: {heads}}}\npreset: fast\nlayout: {layout}\n")
        fuse(model, tmp_path / layout, "--config", tmp_path / "options.yaml")
    fuse(model, tmp_path / "gqa", "--layout", "gqa", "--budget", "0.5", "--preset", "fast")
    folders = [tmp_path / layout for layout in ("layerwise", "gqa", "decoupled")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HOME": str(tmp_path / "hf")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [PYTHON, ROOT / "scripts/check_vllm.py", *folders],
        cwd=tmp_path, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    layerwise, gqa, decoupled = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert layerwise["architecture"] == "DeciLMForCausalLM"
    assert layerwise["num_kv_heads"] == [2, 4, 1]
    assert gqa["architecture"] == {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]
    assert gqa["num_kv_heads"] == [2, 2, 2]
    assert max(f["largest_difference_of_log_probabilities"] for f in (layerwise, gqa)) < 1e-4
    assert decoupled["architecture"] == "TransformersForCausalLM"  # which the model code refuses
