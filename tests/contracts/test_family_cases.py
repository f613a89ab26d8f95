"""What single families have: masks in the file, packed projections, norms that an option brings; and those refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import headfuse
from headfuse.models.attention import AttentionWeights
from headfuse.models.families import ARCHITECTURES, UNSUPPORTED
from tests.support.commands import fuse, run
from tests.support.model_outputs import logits
from tests.support.planted_heads import edit_weights, plant
from tests.support.tiny_models import FAMILY_OPTIONS, tiny_model


@pytest.mark.parametrize("family", ["olmo2", "qwen3", "phi", "gpt2"])
def test_planted_groups_of_unequal_sizes_are_lossless(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family)
    plant(model, [[0, 1, 3], [2]], [[0], [1, 2, 3]])
    fuse(model, tmp_path / "out", "--budget", "1/2", "--preset", "fast")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=2e-5, atol=2e-5)


def test_a_checkpoint_of_the_base_model_with_its_masks(tmp_path: Path) -> None:
    """As gpt2 lies on the hub: names without their first part, and causal masks among the tensors."""
    model = tiny_model(tmp_path / "model", "gpt2")
    plant(model, [[0, 3], [1, 2]])
    expected, file = logits(model), model / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(2)}
    save_file(tensors, file, metadata={"format": "pt"})
    document = fuse(model, tmp_path / "out", "--budget", "1/2", "--preset", "fast")
    assert document["kv_ratio"] == 0.5
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["phi3"])
def test_heads_that_do_not_fit_a_fused_projection_are_refused(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8})
    )
    text = ("--data", tmp_path / "text.txt", "--sequence-length", 32)
    assert "config.json makes it" in run("fuse", model, *text, code=1)


@pytest.mark.parametrize("model_type", [*UNSUPPORTED, "openai-gpt"])
def test_other_families_are_refused_with_the_reason(tmp_path: Path, model_type: str) -> None:
    if model_type in ("headfuse", "headfuse_latent", "nemotron-nas"):
        pytest.skip("tests/robustness/test_bad_models.py")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"any": torch.zeros(1)}, model / "model.safetensors", {"format": "pt"})
    lines = run("fuse", model, "--json", code=1).splitlines()
    document = json.loads(next(line for line in lines if line.startswith('{"schema_version"')))
    assert model_type in document["error"]["what"]
    assert UNSUPPORTED.get(model_type, "") in document["error"]["what"]
    assert all(family in document["error"]["fix"] for family in ARCHITECTURES)


@pytest.mark.parametrize("layout", ["latent", "decoupled", pytest.param("gqa", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("family", "option"),
    [("cohere", "use_qk_norm"), ("glm4_moe", "use_qk_norm"), ("phi", "qk_layernorm"), ("stablelm", "qk_layernorm")],
)
def test_norms_that_an_option_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, option: str, layout: str
) -> None:
    """LayerNorms, with a weight for all heads or one for each, and channels behind a norm that are not rotated."""
    monkeypatch.setitem(FAMILY_OPTIONS, family, {**FAMILY_OPTIONS.get(family, {}), option: True})
    model = tiny_model(tmp_path / "model", family, query_heads=8)
    whole = ("--budget", 1, "--samples", 2, "--allocator", "uniform", "--preset", "fast", "--layout", layout)
    fuse(model, tmp_path / "whole", *whole)
    torch.testing.assert_close(logits(tmp_path / "whole"), logits(model), rtol=1e-5, atol=1e-5)
    plant(model, [[0, 3], [1, 2]])
    fuse(model, tmp_path / "out", "--budget", "1/2", "--layout", layout, "--preset", "fast")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=2e-5, atol=2e-5)
    loaded, tokens = headfuse.load(tmp_path / "out"), torch.randint(1, 300, (1, 20))
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(*(loaded.generate(tokens, use_cache=cached, **greedy) for cached in (True, False)))


def test_keys_behind_a_layer_norm_are_fitted_to_the_normed_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of other sizes than each other, which the norm takes off, are one head."""
    monkeypatch.setitem(FAMILY_OPTIONS, "phi", {"qk_layernorm": True, "layer_norm_eps": 1e-12})
    model = tiny_model(tmp_path / "model", "phi")

    def change(weights: AttentionWeights, arch: Any, heads: Any) -> None:
        for first, other in ((0, 3), (1, 2)):
            weights.key[other], weights.value[other] = 2 * weights.key[first], weights.value[first]
            assert weights.key_bias is not None
            assert weights.value_bias is not None
            weights.key_bias[other], weights.value_bias[other] = 2 * weights.key_bias[first], weights.value_bias[first]

    edit_weights(model, change)
    fuse(model, tmp_path / "out", "--budget", "1/2", "--layout", "decoupled", "--preset", "fast")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-4, atol=1e-4)
