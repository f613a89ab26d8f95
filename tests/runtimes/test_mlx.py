"""Layout `layerwise` in mlx-lm, which has DeciLM under the model type of these folders, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.commands import fuse
from tests.support.tiny_models import VOCABULARY, tiny_model

ROOT = Path(__file__).parents[2]
MLX = Path(os.environ.get("HEADFUSE_MLX", ROOT / ".venv/mlx"))
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not (MLX / "bin/python").exists(), reason="no environment with mlx-lm: ./scripts/check_mlx.sh")
@pytest.mark.parametrize("rope", ROPE)
def test_mlx_computes_what_transformers_does(tmp_path: Path, rope: str) -> None:
    """Of a model whose feed-forward width is a multiple of 256, as `ffn_mult` can say no other."""
    model = tiny_model(tmp_path / "model")  # its tokenizer and text
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
        rope_parameters=ROPE[rope],
    )  # fmt: skip
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    source.save_pretrained(model)
    (tmp_path / "options.yaml").write_text("budget: {key_heads: [2, 4, 1], value_heads: [2, 4, 1]}\npreset: fast\n")
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml", "--layout", "layerwise")
    prompt, environment = list(range(5, 65)), {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [MLX / "bin/python", ROOT / "scripts/check_mlx.py", tmp_path / "out"],
        input=json.dumps(prompt), capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert document["heads"] == [2, 4, 1]
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = fused(torch.tensor([prompt])).logits[0].log_softmax(-1)
    torch.testing.assert_close(torch.tensor(document["log_probabilities"]), expected, atol=1e-4, rtol=0)
