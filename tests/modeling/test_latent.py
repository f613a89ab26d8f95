"""Shipped model code of wide heads against the stock class with the keys and values that they give back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headfuse.modeling import LatentConfig, LatentForCausalLM

WIDTH, HEADS, D, VOCABULARY = 64, 8, 8, 50
ONE_GROUP = ([[0, 1, 2, 3]], [20], [13], [[0, 0, 1, 1, 2, 2, 3, 3, 3, 1]])
TWO_GROUPS = ([[3, 1], [0, 2]], [8, 4], [3, 9], [[0, 1, 1, 3], [2, 0]])
LAYERS = {
    "one group": [ONE_GROUP, ONE_GROUP],
    "groups": [TWO_GROUPS, ONE_GROUP],
    "full": [([[0, 1, 2, 3]], [32], [32], [[f for f in range(4) for _ in range(4)]])] * 2,
}


def fused_config(layers: list[Any], family: str = "llama", **options: Any) -> LatentConfig:
    source = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=len(layers),
        num_attention_heads=HEADS, num_key_value_heads=4, head_dim=D, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=0, pad_token_id=None, **options,
    )  # fmt: skip
    groups, keys, values, slots = (list(part) for part in zip(*layers, strict=True))
    return LatentConfig(source_config=source, groups=groups, key_widths=keys, value_widths=values, rotary_slots=slots)


def random_model(config: LatentConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def expanded(model: Any) -> Any:
    """The stock model whose keys and values are what the cached ones give back."""
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.source_config)).eval()
    state = {
        k: v for k, v in model.state_dict().items() if "_read" not in k and "k_proj" not in k and "v_proj" not in k
    }
    for index, layer in enumerate(model.model.layers):
        attention, heads_k, heads_v = layer.self_attn, [torch.empty(0)] * 4, [torch.empty(0)] * 4
        for group, (factors, _, value_read) in zip(attention.groups, attention._read_maps(), strict=True):
            for i, head in enumerate(group.heads):
                key = attention.k_proj.weight[group.key]
                first, second = key[: group.slots], key[group.slots :]
                out = torch.zeros(D, WIDTH)
                for s, f in enumerate(attention.frequencies[group.rotated].tolist()):
                    real, imaginary = factors[i, s]
                    out[f] += real * first[s] - imaginary * second[s]
                    out[D // 2 + f] += real * second[s] + imaginary * first[s]
                heads_k[head] = out
                heads_v[head] = value_read[i].T @ attention.v_proj.weight[group.value]
        prefix = f"model.layers.{index}.self_attn."
        state[prefix + "k_proj.weight"], state[prefix + "v_proj.weight"] = torch.cat(heads_k), torch.cat(heads_v)
    stock.load_state_dict(state)
    return stock


@pytest.fixture(params=LAYERS)
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(fused_config(LAYERS[request.param]))


def tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_equal_the_expanded_stock_model(model: Any) -> None:
    torch.testing.assert_close(model(tokens()).logits, expanded(model)(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_greedy_tokens_equal_the_expanded_stock_model(model: Any, cache: str, attention: str) -> None:
    model.set_attn_implementation(attention)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    kind = None if cache == "dynamic" else cache
    found = model.generate(tokens(), attention_mask=mask, cache_implementation=kind, disable_compile=True, **options)
    assert torch.equal(found, expanded(model).generate(tokens(), attention_mask=mask, **options))


@torch.no_grad()
def test_the_cache_holds_the_widths(model: Any) -> None:
    cache = model(tokens(), use_cache=True).past_key_values
    for layer, keys, values in zip(cache.layers, model.config.key_widths, model.config.value_widths, strict=True):
        assert layer.keys.shape == (2, 1, 12, sum(keys))
        assert layer.values.shape == (2, 1, 12, sum(values))


def test_it_is_a_latent_model(model: Any) -> None:
    assert isinstance(model, LatentForCausalLM)


FULL: Any = [([[2, 0], [1, 3]], [16, 16], [16, 16], [[f for f in range(4) for _ in range(2)]] * 2)] * 2


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "hunyuan_v1_dense"])
@torch.no_grad()
def test_write_maps_are_undone_by_their_inverses(family: str) -> None:
    """Keys behind a norm of a head, of a layer, and rotated before a norm: full width computes what the source does."""
    model = random_model(fused_config(FULL, family))
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.source_config)).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in stock.state_dict()}
    for index, layer in enumerate(model.model.layers):
        attention, value = layer.self_attn, torch.empty(4, D, WIDTH)
        maps = zip(attention._key_maps(attention.key_write, None), attention._read_maps(), strict=True)
        for group, ((write, _), (read, _, value_read)) in zip(attention.groups, maps, strict=True):
            for f in range(4):  # two slots of each frequency, which two heads write and read
                own = slice(2 * f, 2 * f + 2)
                inverse = torch.linalg.inv(torch.view_as_complex(write[:, own].contiguous()))
                read[:, own] = torch.view_as_real(inverse.T.contiguous())
            value[group.heads] = value_read.mT @ attention.v_proj.weight[group.value]
        state[f"model.layers.{index}.self_attn.v_proj.weight"] = value.flatten(0, 1)
    stock.load_state_dict(state)
    torch.testing.assert_close(model(tokens()).logits, stock(tokens()).logits, rtol=1e-4, atol=1e-4)
