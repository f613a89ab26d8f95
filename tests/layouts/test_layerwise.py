"""Layout `layerwise`: one head count for keys and values in each layer, as DeciLM `block_configs`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import headfuse
from headfuse.choices import LAYOUT_FOR
from headfuse.errors import CheckpointError
from headfuse.layouts import LAYOUTS, layerwise
from headfuse.plan import FusionPlan
from tests.support.commands import fuse, run
from tests.support.model_outputs import logits
from tests.support.tiny_models import tiny_model


def whole_context(folder: Path) -> Path:
    """A model whose every layer attends to all tokens."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"sliding_window": None, "use_sliding_window": False}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose layers have 4, 2 and 1 KV heads; the source is `model` beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = whole_context(tiny_model(folder / "model", request.param, query_heads=8, layers=3))
    (folder / "options.yaml").write_text("budget: {key_heads: [4, 2, 1], value_heads: [4, 2, 1]}\npreset: fast\n")
    fuse(model, folder / "out", "--config", folder / "options.yaml", "--layout", "layerwise")
    return folder / "out"


one_family = pytest.mark.parametrize("fused", ["qwen2"], indirect=True)


# ---------------------------------------------------------------- the folder


def test_the_budget_and_the_groups(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", query_heads=8, layers=3)
    (tmp_path / "options.yaml").write_text("layout: layerwise\nbudget: {total: 7/12, keep_layers: [1]}\npreset: fast\n")
    document = fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml")
    assert document["key_heads"] == document["value_heads"]
    assert document["key_heads"][1] == 4
    assert sum(document["key_heads"]) == 7
    plan = FusionPlan.from_json((tmp_path / "out/plan.json").read_text())
    for layer in plan.layers:
        assert layer.key_groups == layer.value_groups
        assert len({len(group) for group in layer.key_groups}) == 1
        assert layer.rotary_slots is None


def test_blocks_are_those_of_decilm(fused: Path) -> None:
    config = json.loads((fused / "config.json").read_text())
    source = AutoConfig.from_pretrained(fused.parent / "model")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert [block["attention"]["n_heads_in_group"] for block in config["block_configs"]] == [2, 4, 8]
    assert config["num_key_value_heads"] == 4
    assert config["qkv_bias"] == (source.model_type == "qwen2")
    assert not config["attention_bias"]
    for name in ("rms_norm_eps", "rope_parameters", "vocab_size", "max_position_embeddings", "hidden_act"):
        assert config[name] == getattr(source, name), name
    loaded = AutoConfig.from_pretrained(fused)
    assert loaded.block_configs[1].attention.n_heads_in_group == 4
    assert not loaded.block_configs[1].ffn.no_op
    assert not hasattr(loaded.block_configs[1].ffn, "hidden_act")


@pytest.mark.parametrize(("width", "hidden"), [(48, 32), (11008, 4096), (1536, 576), (14336, 4096), (8960, 1536)])
def test_runtimes_compute_the_width_of_the_feed_forward_part(width: int, hidden: int) -> None:
    """vLLM and mlx-lm take `ffn_mult` by this rule, with the multiple of 256; mlx-lm refuses other keys."""
    ffn = layerwise._ffn(width, hidden)
    if "ffn_mult" in ffn:
        asked = int(2 * ffn["ffn_mult"] * hidden / 3)
        assert asked + -asked % 256 == width
        assert ffn.keys() == {"no_op", "replace_with_linear", "ffn_mult"}
    else:
        assert width % 256
        assert ffn["intermediate_size"] == width


def test_interfaces_and_caches_agree(fused: Path) -> None:
    model = headfuse.load(fused)
    tokens = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        eager = model(tokens, output_attentions=True)
        torch.testing.assert_close(eager.logits, expected, rtol=1e-4, atol=1e-4)
        assert len(eager.attentions) == 3
        model.set_attn_implementation("sdpa")
        cache = StaticCache(model.config, max_cache_len=16)
        steps = [model(tokens[:, i : i + 4], past_key_values=cache).logits for i in range(0, 12, 4)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert [layer.keys.shape[1] for layer in cache.layers] == [4, 2, 1]


@one_family
def test_it_trains_with_checkpointing(fused: Path) -> None:
    model = headfuse.load(fused).train()
    model.gradient_checkpointing_enable()
    tokens = torch.randint(1, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@one_family
def test_uptrain_and_eval_keep_the_layout(fused: Path, tmp_path: Path) -> None:
    text = fused.parent / "text.txt"
    small = ("--data", text, "--sequence-length", 16)
    run("uptrain", fused, "-o", tmp_path / "out", "--tokens", 64, *small, "--batch-size", 1, "-q")
    line = run("eval", tmp_path / "out", "--baseline", fused.parent / "model", *small, "--samples", 2, "--json")
    document = json.loads(line.splitlines()[-1])
    assert document["comparison"]["kv_ratio"] == pytest.approx(7 / 12)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.self_attn.k_proj.out_features for layer in model.model.layers] == [32, 16, 8]
    assert (tmp_path / "out/modeling_layerwise.py").read_text() == (fused / "modeling_layerwise.py").read_text()


@one_family
def test_the_code_beside_the_weights_is_enough(fused: Path, tmp_path: Path) -> None:
    torch.save(logits(fused), tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["headfuse"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(fused)!r}, trust_remote_code=True, dtype="float32")
tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(2))
with torch.no_grad():
    torch.testing.assert_close(model(tokens).logits, torch.load("expected.pt"))
base = AutoModel.from_config(model.config, trust_remote_code=True)
assert base.layers[2].self_attn.k_proj.out_features == 8
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True, dtype="float32")
with torch.no_grad():
    torch.testing.assert_close(again(tokens).logits, torch.load("expected.pt"))
"""
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "again/config.json").read_text())
    assert saved["block_configs"] == json.loads((fused / "config.json").read_text())["block_configs"]
    assert saved["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


@one_family
def test_vllms_backend_for_other_classes_is_refused(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one number of KV heads; vLLM's own class has one for each layer."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", ALL_ATTENTION_FUNCTIONS["sdpa"])
    with pytest.raises(NotImplementedError, match="DeciLMForCausalLM of its own"):
        AutoModel.from_config(AutoConfig.from_pretrained(fused), attn_implementation="vllm")


@one_family
def test_continuous_batching_is_refused(fused: Path) -> None:
    with pytest.raises(NotImplementedError, match="layout layerwise: generate_batch"):
        headfuse.load(fused).generate_batch([[1, 2, 3]])


@one_family
def test_a_whole_model_can_be_pickled(fused: Path, tmp_path: Path) -> None:
    model, tokens = headfuse.load(fused), torch.arange(1, 9)[None]
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_the_config_has_defaults(fused: Path) -> None:
    """vLLM builds one without arguments."""
    from headfuse.modeling import LayerwiseConfig

    assert set(LayerwiseConfig().num_key_value_heads_per_layer) == {32}


def test_the_base_model_loads_alone(fused: Path) -> None:
    assert AutoModel.from_pretrained(fused).layers[1].self_attn.v_proj.out_features == 16


# ---------------------------------------------------------------- refusals


def _group(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["block_configs"][1]["attention"].update(n_heads_in_group=value)


@one_family
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_group(3), "n_heads_in_group: is 3"),
        (_group("2"), "n_heads_in_group"),
        (_group(None), "n_heads_in_group"),
        (lambda config: config["block_configs"].pop(), "list of 3"),
        (lambda config: config.update(block_configs={}), "list of 3"),
        (lambda config: config["block_configs"][0].pop("ffn"), "attention and ffn"),
        (lambda config: config["block_configs"][2]["ffn"].update(no_op=True), "no_op"),
        (lambda config: config.update(headfuse_format=2), "headfuse_format"),
    ],
)
def test_damaged_configs(fused: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    for file in fused.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((fused / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        headfuse.load(tmp_path)


@one_family
def test_a_layerwise_folder_is_no_source(fused: Path, tmp_path: Path) -> None:
    assert "already a" in run("fuse", fused, "-o", tmp_path / "out", code=1)


def test_models_that_see_a_window_are_refused_before_any_work(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "mistral")
    for arguments in (["fuse", model, "-o", tmp_path / "out"], ["fuse", model, "--dry-run"], ["analyze", model]):
        message = run(*arguments, "--layout", "layerwise", "--budget", "0.5", code=1)
        assert "the last 16" in message
        assert "gqa or decoupled" in message


@pytest.mark.parametrize("runtime", sorted(LAYOUT_FOR))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@one_family
def test_for_accepts_what_the_runtime_loads(fused: Path, runtime: str, layout: str) -> None:
    model = fused.parent / "model"
    other_width = (runtime, layout) == ("vllm", "gqa")  # this qwen2 has head_dim 8, not hidden_size / heads
    code = 0 if layout in LAYOUT_FOR[runtime] and not other_width else 1
    options = ("--for", runtime, "--layout", layout, "--budget", "0.5", "--sequence-length", 32)
    output = run("fuse", model, "--dry-run", *options, code=code)
    reason = "4 channels only" if other_width else f"it loads {', '.join(LAYOUT_FOR[runtime])}"
    assert code == 0 or reason in output
