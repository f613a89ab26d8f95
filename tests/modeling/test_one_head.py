"""One wide KV head per layer, with a stand-in for vLLM's attention; tests/runtimes/test_vllm.py has vLLM itself."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headfuse.modeling import HeadfuseConfig, LatentConfig
from tests.modeling import test_latent as latent
from tests.modeling.random_models import SOURCES, close, fused_config, random_model, rotary_table, tokens

WITH_SLOTS = [rotary_table(3, seed=0), None, rotary_table(6, seed=1)]


def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> Any:
    """What vLLM does with the states: one sequence, rows of tokens [s, heads * width], its own causal mask."""
    attn, width = module.attn, query.shape[-1]
    query, key, value = (states.transpose(1, 2).reshape(query.shape[2], -1) for states in (query, key, value))
    query, key, value = (states.unflatten(-1, (-1, width)).transpose(0, 1) for states in (query, key, value))
    assert key.shape[0] == value.shape[0] == attn.num_kv_heads
    assert width == attn.head_size
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    seen = (distance >= 0) & (distance < (attn.sliding_window or len(distance)))
    output = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], seen, scale=module.scaling, enable_gqa=True
    )
    return output[0].transpose(0, 1).flatten(1), None


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that vLLM runs in."""
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", attend)


def served(model: Any) -> Any:
    """The model as vLLM sets it up: by the config of every layer, with an attention of its own in each."""
    config = type(model.config)(**model.config.to_dict())
    other = AutoModelForCausalLM.from_config(config, attn_implementation="vllm").eval()
    other.load_state_dict(model.state_dict())
    for index, layer in enumerate(other.base_model.layers):
        own = config.per_layer_config[index]
        layer.self_attn.attn = SimpleNamespace(
            num_heads=own.num_attention_heads, num_kv_heads=own.num_key_value_heads, head_size=own.head_dim,
            sliding_window=layer.self_attn.sliding_window,
        )  # fmt: skip
    return other


@pytest.mark.parametrize(("maps", "slots"), [("free", None), ("free", WITH_SLOTS), ("nested", None), ("full", None)])
@pytest.mark.parametrize("source", ["llama-bias", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_decoupled_heads_side_by_side_compute_the_same(vllm: None, source: str, maps: str, slots: Any) -> None:
    model = random_model(fused_config(SOURCES[source](), maps, slots))
    text = tokens(batch=1)
    close(served(model)(text, use_cache=False).logits, model(text).logits)


@pytest.mark.parametrize("layers", latent.LAYERS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_latent_groups_side_by_side_compute_the_same(vllm: None, family: str, layers: str) -> None:
    model = latent.random_model(latent.fused_config(latent.LAYERS[layers], family))
    text = tokens(batch=1) % latent.VOCABULARY
    close(served(model)(text, use_cache=False).logits, model(text).logits)


def test_vllm_reads_one_wide_head_of_every_layer(vllm: None) -> None:
    config: Any = fused_config(SOURCES["llama"](), "free")
    layers = list(config.per_layer_config)
    assert [layer.num_key_value_heads for layer in layers] == [1, 1, 1]
    assert [layer.head_dim for layer in layers] == [32, 32, 48]  # 3, 4 and 6 heads of 8; 32 is the least
    assert config.head_dim == 8  # which RoPE reads
    wide: Any = latent.fused_config(latent.LAYERS["full"])
    assert [layer.head_dim for layer in wide.per_layer_config] == [32, 32]


def test_elsewhere_a_config_says_nothing_of_it(vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = fused_config(SOURCES["llama"](), "free"), latent.fused_config(latent.LAYERS["groups"])
    monkeypatch.delitem(sys.modules, "vllm")
    for config in configs:
        again = type(config)(**config.to_dict())
        assert not again.is_heterogeneous
        assert "per_layer_config" not in again.to_dict()


@pytest.mark.parametrize(
    ("name", "value"), [("num_heads", 3), ("num_kv_heads", 2), ("head_size", 64), ("sliding_window", 8)]
)
def test_an_attention_of_other_heads_is_refused(vllm: None, name: str, value: int) -> None:
    """Half of the query heads: that of one of two processes in tensor parallelism."""
    model = served(random_model(fused_config(SOURCES["llama"](), "free")))
    setattr(model.model.layers[1].self_attn.attn, name, value)
    with pytest.raises(NotImplementedError, match=rf"layer 1: .* {name} {value} for .* without tensor parallelism"):
        model(tokens(batch=1), use_cache=False)


def test_a_vllm_that_makes_no_attention_is_refused(vllm: None) -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    model.set_attn_implementation("vllm")
    with pytest.raises(NotImplementedError, match="num_heads None for 6"):
        model(tokens(batch=1))


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_families_that_vllm_does_not_run_are_refused(vllm: None, family: str) -> None:
    source = AutoConfig.for_model(family, vocab_size=97, n_embd=32, hidden_size=32, n_layer=1, n_head=2, rotary_dim=8)
    config = HeadfuseConfig(
        source_config=source, num_key_heads=[1], num_value_heads=[1], key_head_of_query=[[0, 0]],
        value_head_of_query=[[0, 0]],
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=f"does not run {family}: .* --layout gqa"):
        AutoModel.from_config(config, attn_implementation="vllm")


@pytest.mark.parametrize("config", [fused_config(SOURCES["llama"](), "free"), latent.fused_config([latent.ONE_GROUP])])
def test_a_runtime_of_one_kv_head_count_is_refused(
    config: HeadfuseConfig | LatentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sglang", ALL_ATTENTION_FUNCTIONS["sdpa"])
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(NotImplementedError, match=f"layout {config.layout}: sglang"):
            auto.from_config(copy.deepcopy(config), attn_implementation="sglang")
    model = AutoModel.from_config(config)
    model.set_attn_implementation("sglang")
    with pytest.raises(NotImplementedError, match="sglang"):
        model(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("config", [fused_config(SOURCES["llama"](), "free"), latent.fused_config([latent.ONE_GROUP])])
def test_continuous_batching_is_refused(config: HeadfuseConfig | LatentConfig) -> None:
    """It would log an error for each request, and return no tokens."""
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(NotImplementedError, match=f"layout {config.layout}: generate_batch"):
        model.generate_batch([[1, 2, 3]])


def test_granites_scale_of_logits_has_the_name_that_vllm_reads(vllm: None) -> None:
    assert fused_config(AutoConfig.for_model("granite", num_hidden_layers=3, num_attention_heads=6,
                                             logits_scaling=4.0), "free").logit_scale == 0.25  # fmt: skip
