"""FSDP2 in two processes, each with a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headfuse.training.uptrain import uptrain
from tests.support.pretended_cuda import device
from tests.support.tiny_models import tiny_model
from tests.training.runs import records

pytestmark = pytest.mark.skipif(not device.started(), reason="its processes pretend to have a device each")
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true", "OMP_NUM_THREADS": "1",
    "ACCELERATE_MIXED_PRECISION": "bf16",
}  # fmt: skip


RECIPE = "validation_windows: 2\nsequence_length: 32\nhidden: 0.5\nlayerwise: 0.5\n"


def test_shards_learn_from_a_float16_teacher_as_one_process_does(tmp_path: Path) -> None:
    """Their layers compute in bfloat16, everything else is in float32, as under autocast."""
    model, text = tiny_model(tmp_path / "model", dtype="float16"), str(tmp_path / "text.txt")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    one = uptrain(
        model, tmp_path / "recipe.yaml", teacher=str(model), data=text, tokens=256, batch_size=4, device="cuda",
        output=tmp_path / "one",
    )  # fmt: skip
    arguments = [
        "uptrain", model, "--config", tmp_path / "recipe.yaml", "--teacher", model, "--data", text, "--tokens", 256,
        "--batch-size", 2, "--device", "cuda", "-o", tmp_path / "two", "--verbose",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "tests.support.pretended_cuda", "--no-count", "--", "headfuse", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **FSDP}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("GB on each device: weights") == 1  # of the first process
    first, *_, last = records(tmp_path / "two")
    assert first["nll_before"] == pytest.approx(one.nll_before, abs=2e-3)
    assert first["nll_teacher"] == pytest.approx(one.nll_teacher, abs=2e-3)
    assert last["nll_after"] == pytest.approx(one.nll_after, abs=2e-2)
