"""Layout gqa with heads of another width: `--head-dim`, one table of rotary slots, the source's own class."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headfuse.layouts.slot_table import FAMILIES
from headfuse.models.families import ARCHITECTURES
from tests.support.commands import fuse, run
from tests.support.model_outputs import logits
from tests.support.planted_heads import plant
from tests.support.tiny_models import tiny_model

WIDE = ("--layout", "gqa", "--preset", "fast")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def text_of(model: Path) -> tuple[str, ...]:
    """Options of the text beside a tiny model."""
    return "--data", str(model.parent / "text.txt"), "--samples", "8", "--sequence-length", "32"


def as_latent(folder: Path, path: Path) -> Path:
    """The plan of a folder, for layout latent."""
    plan = {**json.loads((folder / "plan.json").read_text()), "layout": "latent", "files": {}, "seal": None}
    path.write_text(json.dumps(plan))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_full_width_is_the_source(tmp_path: Path, family: str) -> None:
    query_heads = 4 if family in ("cohere", "olmo") else 8
    model = tiny_model(tmp_path / "model", family, query_heads=query_heads)
    if family == "olmo":
        path = model / "config.json"
        path.write_text(json.dumps({**config_of(model), "clip_qkv": None}))
    document = fuse(model, tmp_path / "out", "--budget", "1", "--head-dim", "32", *WIDE)
    assert document["kv_ratio"] == 1
    assert document["nll"]["after"] == pytest.approx(document["nll"]["before"], abs=1e-4)  # with its own rotary table
    config = config_of(tmp_path / "out")
    assert (config["head_dim"], config["num_key_value_heads"]) == (32, 1)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-4, atol=1e-4)


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    for family in ("qwen3", "phi3", "stablelm", "gpt2"):
        assert family in ARCHITECTURES
        model = tiny_model(tmp_path / family, family)
        output = run("fuse", model, "--layout", "gqa", "--head-dim", "16", *text_of(model), code=1)
        assert family in output
        assert "--layout" in output


def test_auto_is_the_sources_width_where_the_class_has_no_other(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen3", query_heads=8)
    fuse(model, tmp_path / "out", "--budget", "1/2", "--head-dim", "auto", *WIDE)
    config = config_of(tmp_path / "out")
    assert (config["head_dim"], config["num_key_value_heads"]) == (8, 2)


def test_auto_of_the_sources_width_is_the_stock_layout(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    fuse(model, tmp_path / "auto", "--budget", "1/4", "--head-dim", "auto", *WIDE)
    fuse(model, tmp_path / "stock", "--budget", "1/4", *WIDE)
    assert (tmp_path / "auto/model.safetensors").read_bytes() == (tmp_path / "stock/model.safetensors").read_bytes()


@pytest.mark.parametrize(("budget", "width"), [("1/2", "16"), ("3/4", "auto"), ("1/4", "8")])
def test_the_stock_class_computes_what_latent_does(tmp_path: Path, budget: str, width: str) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    fuse(model, tmp_path / "out", "--budget", budget, "--head-dim", width, *WIDE)
    fuse(model, tmp_path / "latent", "--plan", as_latent(tmp_path / "out", tmp_path / "plan.json"), "--preset", "fast")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "latent"), rtol=1e-4, atol=1e-4)


def test_it_loads_where_headfuse_is_not(tmp_path: Path) -> None:
    fuse(tiny_model(tmp_path / "model"), tmp_path / "out", "--budget", "1/2", "--head-dim", "auto", *WIDE)
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
tokens = torch.arange(12)[None]
out = model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=True)
assert torch.equal(out, model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))
cache = model(tokens, use_cache=True).past_key_values
assert [layer.keys.shape[-1] for layer in cache.layers] == [16, 16]
assert not any(name.startswith("headfuse") for name in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr


def test_one_heads_width_holds_equal_heads(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", query_heads=8)
    plant(model, [[0, 1, 2, 3]])
    fuse(model, tmp_path / "out", "--budget", "1/4", "--head-dim", "8", *WIDE)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}])  # fmt: skip
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_scaled_frequencies_stay(tmp_path: Path, rope: dict[str, Any], name: str) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    config = config_of(model)
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {name: {**rope, "rope_theta": theta}} if name == "rope_parameters" else {name: rope, "rope_theta": theta}
    (model / "config.json").write_text(json.dumps(config))
    fuse(model, tmp_path / "out", "--budget", "1", "--head-dim", "32", *WIDE)
    assert name in config_of(tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-4, atol=1e-4)


def test_refinement_goes_on_from_the_closed_form(tmp_path: Path) -> None:
    """Its layers see their own rotary table, too: a gradient of another model would lead away."""
    model, options = tiny_model(tmp_path / "model"), ("--budget", "1/2", "--head-dim", "auto", "--layout", "gqa")
    closed, refined = fuse(model, tmp_path / "best", *options, "--preset", "best")["stages"]
    assert refined["nll"] == pytest.approx(closed["nll"], abs=0.02)
    assert refined["nll"] != closed["nll"]


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("--head-dim", "7"), "even number of channels", 2),
        (("--head-dim", "wide"), "even number of channels", 2),
        (("--head-dim", "64", "--layout", "gqa"), "at most 32", 1),
        (("--head-dim", "32", "--layout", "gqa", "--budget", "1/4"), "smallest budget", 1),
        (("--head-dim", "16", "--layout", "decoupled"), "add --layout gqa", 1),
        (("--head-dim", "16", "--layout", "gqa", "--method", "mean"), "makes no wide heads", 1),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, options: tuple[str, ...], words: str, code: int) -> None:
    model = tiny_model(tmp_path / "model")
    output = run("fuse", model, *options, *text_of(model), code=code)
    assert words in " ".join(output.replace("│", " ").split())
    assert not list(tmp_path.glob("model-headfuse*"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2"])
def test_export_of_latent_gives_the_same_logits(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family, query_heads=8)
    fuse(model, tmp_path / "out", "--budget", "1/2", "--head-dim", "16", *WIDE)
    latent = tmp_path / "latent"
    fuse(model, latent, "--plan", as_latent(tmp_path / "out", tmp_path / "plan.json"), "--preset", "fast")
    run("export", latent, "--to", "gqa", "-o", tmp_path / "stock")
    assert config_of(tmp_path / "stock")["model_type"] == family
    assert load_file(tmp_path / "stock/model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    assert not list((tmp_path / "stock").glob("*.py"))
    torch.testing.assert_close(logits(tmp_path / "stock"), logits(latent), rtol=1e-4, atol=1e-4)
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("stock", "out")]
    assert plans[0]["layers"] == plans[1]["layers"]


def test_export_of_unequal_widths_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    fuse(model, tmp_path / "latent", "--budget", "0.4", "--layout", "latent", "--preset", "fast")
    output = run("export", tmp_path / "latent", "--to", "gqa", code=1)
    assert "--head-dim auto" in " ".join(output.split())
    assert "--to gqa" in run("export", tmp_path / "latent", "--to", "gguf", code=1)


def test_layerwise_has_no_other_widths(tmp_path: Path) -> None:
    fuse(tiny_model(tmp_path / "model"), tmp_path / "out", "--budget", "1/2", "--head-dim", "16", *WIDE)
    assert "--head-dim" in run("export", tmp_path / "out", "--to", "layerwise", code=1)
