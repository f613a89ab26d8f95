"""What uptraining changes in families with packed projections and in layouts of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from headfuse.layouts import LAYOUTS
from headfuse.models.attention import AttentionWeights
from headfuse.models.families import ARCHITECTURES
from headfuse.models.heads import head_layout
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt2", "llama"])
def test_keys_and_values_have_their_own_learning_rate_where_they_are_packed(tmp_path: Path, family: str) -> None:
    """Stock folders: layout decoupled packs nothing."""
    model = tiny_model(tmp_path / "model", family)
    arch, heads = ARCHITECTURES[family], head_layout(AutoConfig.from_pretrained(model))
    options = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    config = {**json.loads((model / "config.json").read_text()), **options}
    (model / "config.json").write_text(json.dumps(config))
    steps = []
    for rate in (1, 3):
        text = ("--data", tmp_path / "text.txt", "--tokens", 32, "--sequence-length", 32, "--loss", "ce")
        (tmp_path / "recipe.yaml").write_text(f"fused_learning_rate: {rate}\n")
        run("uptrain", model, "-o", tmp_path / f"{rate}", "--config", tmp_path / "recipe.yaml", *text, "-q")
        layers = []
        for folder in (model, tmp_path / f"{rate}"):
            prefix, tensors = arch.layer_prefix(0) + ".", load_file(folder / "model.safetensors")
            layer = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            layers.append(AttentionWeights.of_layer(layer, arch, heads))
        sides = ("query", "key", "value", "query_bias", "value_bias", "output")
        pairs = {side: (getattr(layers[1], side), getattr(layers[0], side)) for side in sides}
        steps.append({side: after - before for side, (after, before) in pairs.items() if before is not None})
    for side, step in steps[0].items():
        assert step.abs().max() > 0
        factor = 3 if side.startswith(("key", "value")) else 1
        torch.testing.assert_close(steps[1][side], factor * step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "lora"])
@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "layerwise"), ("phi3", "gqa"), ("gpt2", "decoupled"), ("gpt2", None)]
)
def test_only_attention_is_trained(tmp_path: Path, family: str, layout: str | None, kind: str) -> None:
    if kind == "lora":
        pytest.importorskip("peft")
    before = tiny_model(tmp_path / "model", family)
    if layout is not None:
        fuse(before, tmp_path / "fused", "-b", "1/2", "--layout", layout, "--preset", "fast")
        before = tmp_path / "fused"
    (tmp_path / "recipe.yaml").write_text(f"train: {kind}\nloss: ce\n")
    text = ("--data", tmp_path / "text.txt", "--tokens", 64, "--sequence-length", 32, "--batch-size", 1)
    run("uptrain", before, "-o", tmp_path / "out", "--config", tmp_path / "recipe.yaml", *text)
    own = ARCHITECTURES[family]
    arch = LAYOUTS[layout].stored(own) if layout is not None else own
    modules = [f".{arch.attention}.{module}." for module in (*arch.projections, arch.output)]
    source, trained = load_file(before / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name, tensor in source.items():
        adapted = any(module in name for module in modules) and (kind == "attention" or "bias" not in name)
        assert torch.equal(tensor, trained[name]) != adapted, name
