"""Laws of reproducibility: the same bytes, and a plan that knows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from headfuse.plan import FusionPlan
from tests.laws.tables import layouts, read_plan
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model


# 8
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sharded_source_gives_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    model = tiny_model(tmp_path / "model", dtype=dtype)
    sharded = tiny_model(tmp_path / "sharded", dtype=dtype)
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(sharded, max_shard_size="20KB")
    (sharded / "model.safetensors").unlink()
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for source in (model, sharded):
        fuse(source, tmp_path / f"{source.name}-out", "--budget", "0.5")
    one, many = (load_file(tmp_path / f"{name}-out/model.safetensors") for name in ("model", "sharded"))
    assert one.keys() == many.keys()
    assert all(one[name].dtype == many[name].dtype and torch.equal(one[name], many[name]) for name in one)
    assert one["model.norm.weight"].dtype == getattr(torch, dtype)


# 9, 10
@layouts
def test_runs_are_reproducible_from_seed_plan_and_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    model, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    fuse(model, out, "--budget", "0.5", "--layout", layout)
    plan = read_plan(out)
    assert FusionPlan.from_json(plan.to_json()) == plan
    fuse(model, tmp_path / "seed", "--budget", "0.5", "--layout", layout)
    fuse(model, tmp_path / "plan", "--budget", "0.5", "--plan", out / "plan.json")
    monkeypatch.chdir(tmp_path)  # headfuse.yaml names the text without its folder
    run("fuse", model, "-o", tmp_path / "yaml", "--config", out / "headfuse.yaml", "-q")
    weights = (out / "model.safetensors").read_bytes()
    for name in ("seed", "plan", "yaml"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == weights, name
    assert (tmp_path / "seed/plan.json").read_bytes() == (out / "plan.json").read_bytes()


def test_outputs_hold_no_absolute_path(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    fuse(model, tmp_path / "out", "--budget", "0.5")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_written_plan_knows_the_checksums(tmp_path: Path) -> None:
    import hashlib

    model = tiny_model(tmp_path / "model")
    fuse(model, tmp_path / "out", "--budget", "0.5")
    files = json.loads((tmp_path / "out/plan.json").read_text())["files"]
    assert files.keys() == {file.name for file in (tmp_path / "out").iterdir()} - {"plan.json"}
    for name, digest in files.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
