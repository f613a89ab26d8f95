"""Layout `decoupled`: the attention equals that of the stock model that it stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from headfuse.modeling import HeadfuseConfig
from tests.modeling.random_models import (
    COMPILER,
    HEAD_DIM,
    IMPLEMENTATIONS,
    LAYERS,
    MAPS,
    QUERIES,
    SIZES,
    SOURCES,
    close,
    expanded,
    fused_config,
    random_model,
    rotary_table,
    tokens,
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("source", SOURCES)
def test_logits_equal_the_expanded_stock_model(source: str, maps: str, implementation: str) -> None:
    fused = random_model(fused_config(SOURCES[source](), maps), attn_implementation=implementation)
    stock = expanded(fused)
    assert list(fused.state_dict()) == list(stock.state_dict())
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :3] = 0
    with torch.no_grad():
        for mask in (None, padding):
            ours, theirs = (model(tokens(), attention_mask=mask, output_attentions=implementation == "eager")
                            for model in (fused, stock))  # fmt: skip
            close(ours.logits[:, 3:], theirs.logits[:, 3:])
            if implementation == "eager":
                close(torch.stack(ours.attentions), torch.stack(theirs.attentions))


def reference_attention(attention: Any, hidden: torch.Tensor, table: list[list[int]]) -> torch.Tensor:
    """Causal attention with rotary slots, one head and one complex plane at a time."""
    config, layer_idx, positions = attention.config, attention.layer_idx, torch.arange(hidden.shape[1])
    query, key, value = (
        getattr(attention, name)(hidden[0]).unflatten(-1, (-1, HEAD_DIM)) for name in ("q_proj", "k_proj", "v_proj")
    )
    base = config.rope_parameters["rope_theta"]
    outputs = []
    for head in range(QUERIES):
        read = config.key_head_of_query[layer_idx][head]
        scores = torch.zeros(len(positions), len(positions))
        for slot, frequency in enumerate(table[read]):
            turn = torch.exp(1j * positions * base ** (-2 * frequency / HEAD_DIM))
            q = torch.complex(query[:, head, slot], query[:, head, slot + HEAD_DIM // 2]) * turn
            k = torch.complex(key[:, read, slot], key[:, read, slot + HEAD_DIM // 2]) * turn
            scores += (q[:, None] * k[None].conj()).real
        weights = (scores * HEAD_DIM**-0.5).masked_fill(positions[:, None] < positions, -torch.inf).softmax(-1)
        outputs.append(weights @ value[:, config.value_head_of_query[layer_idx][head]])
    return attention.o_proj(torch.cat(outputs, -1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rotary_slots_equal_the_reference(implementation: str) -> None:
    source = SOURCES["qwen2"]()
    tables = {0: rotary_table(3, seed=3), 2: rotary_table(6, seed=4)}
    slots = [tables.get(layer_idx) for layer_idx in range(LAYERS)]
    model = random_model(fused_config(source, "free", slots), attn_implementation=implementation)
    hidden = torch.randn(1, 7, 36)
    cos_sin = model.model.rotary_emb(hidden, torch.arange(7)[None])
    mask = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None] if implementation == "eager" else None
    with torch.no_grad():
        for layer_idx, table in tables.items():
            attention = model.model.layers[layer_idx].self_attn
            ours, _ = attention(hidden, cos_sin, mask)
            close(ours[0], reference_attention(attention, hidden, table))


def test_stock_order_written_as_slots_changes_nothing() -> None:
    config = fused_config(SOURCES["llama"](), "free")
    order = [[list(range(HEAD_DIM // 2))] * heads for heads in config.num_key_heads]
    plain, slots = (
        random_model(fused_config(SOURCES["llama"](), "free", table))(tokens()).logits for table in (None, order)
    )
    assert torch.equal(plain, slots)


@pytest.mark.parametrize("maps", MAPS)
def test_decoding_attention_weights_equal_the_expanded_stock_model(maps: str) -> None:
    fused = random_model(fused_config(SOURCES["llama"](), maps), attn_implementation="eager")
    stock = expanded(fused)
    with torch.no_grad():
        ours, theirs = (
            model(tokens()[:, -1:], past_key_values=model(tokens()[:, :-1]).past_key_values, output_attentions=True)
            for model in (fused, stock)
        )
    close(torch.stack(ours.attentions), torch.stack(theirs.attentions))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mask_per_query_head_is_respected(implementation: str) -> None:
    fused = random_model(fused_config(SOURCES["llama"](), "free"), attn_implementation=implementation)
    stock = expanded(fused)
    mask = torch.randn(2, QUERIES, 1, 9, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = (
            model(tokens()[:, -1:], attention_mask=mask, past_key_values=model(tokens()[:, :-1]).past_key_values)
            for model in (fused, stock)
        )
    close(ours.logits, theirs.logits)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("maps", MAPS)
def test_wide_heads_over_long_caches_equal_sdpa(maps: str, head_dim: int) -> None:
    model = random_model(fused_config(LlamaConfig(**SIZES | {"head_dim": head_dim}), maps))
    length = 2048  # the products are other ones there
    for layer, (key_map, value_map) in zip(model.model.layers, MAPS[maps], strict=False):
        query = torch.randn(2, QUERIES, 1, head_dim)
        key, value = (torch.randn(2, max(heads) + 1, length, head_dim) for heads in (key_map, value_map))
        with torch.no_grad():
            output, _ = layer.self_attn.attend_once(query, key, value, None)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key[:, key_map], value[:, value_map])
        close(output, expected.squeeze(2))


@pytest.mark.parametrize("finer", ["key", "value"])
def test_scores_stay_in_place_where_groups_nest(finer: str) -> None:
    maps = {"key": [0, 1, 0, 1, 0, 1], "value": [0, 1, 0, 1, 0, 1]} | {finer: [0, 3, 1, 2, 0, 2]}
    fused = fused_config(SOURCES["llama"](), "free").to_dict()
    config = HeadfuseConfig(
        **fused
        | {f"num_{side}_heads": [max(heads) + 1] * LAYERS for side, heads in maps.items()}
        | {f"{side}_head_of_query": [heads] * LAYERS for side, heads in maps.items()}
    )
    assert random_model(config).model.layers[0].self_attn.score_rows is None


@pytest.mark.parametrize("maps", ["gqa", "free"])
def test_flex_attention_gives_the_logits_of_sdpa(maps: str) -> None:
    model, padding = random_model(fused_config(SOURCES["llama"](), maps)), torch.ones(2, 9, dtype=torch.long)
    padding[0, :3] = 0
    for mask in (None, padding):
        logits = []
        for implementation in ("sdpa", "flex_attention"):
            model.set_attn_implementation(implementation)
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # its own definition, without a kernel
                prefill = model(tokens()[:, :-1], attention_mask=None if mask is None else mask[:, :-1])
                step = model(tokens()[:, -1:], attention_mask=mask, past_key_values=prefill.past_key_values)
            logits.append(torch.cat((prefill.logits[:, 3:], step.logits), 1))
        close(*logits)


@pytest.mark.slow
@COMPILER
def test_a_compiled_flex_attention_prefill_gives_the_logits_of_sdpa() -> None:
    model, logits = random_model(fused_config(SOURCES["llama"](), "free")), []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(tokens()).logits)
    close(*logits)


def test_gradient_checkpointing() -> None:
    model = random_model(fused_config(SOURCES["qwen2"](), "free")).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        close(gradients[1][name], gradient)


def test_switching_the_attention_implementation() -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    logits = {}
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        assert model.model.layers[0].self_attn.config._attn_implementation == implementation
        logits[implementation] = model(tokens()).logits
    close(logits["eager"], logits["sdpa"])


def test_attentions_and_hidden_states_are_recorded() -> None:
    models = [random_model(fused_config(SOURCES[name](), "free")) for name in ("qwen2", "llama", "mistral")]
    for model in models:
        model.set_attn_implementation("eager")
        for run in (model, model.model, copy.deepcopy(model)):
            outputs = run(tokens(), output_attentions=True, output_hidden_states=True)
            assert len(outputs.attentions) == LAYERS
            assert len(outputs.hidden_states) == LAYERS + 1
    stock = LlamaForCausalLM(SOURCES["llama"]())
    assert len(stock(tokens(), output_hidden_states=True).hidden_states) == LAYERS + 1


def test_base_models_of_two_families_record_their_own() -> None:
    qwen2, llama = (
        AutoModel.from_config(fused_config(SOURCES[name](), "free"), attn_implementation="eager")
        for name in ("qwen2", "llama")
    )
    for model in (qwen2, llama):
        outputs = model(tokens(), output_attentions=True, output_hidden_states=True)
        assert (len(outputs.attentions), len(outputs.hidden_states)) == (LAYERS, LAYERS + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_decoding_follows_the_full_forward(dtype: torch.dtype) -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free")).to(dtype)
    with torch.no_grad():
        full = model(tokens()).logits[:, -1]
        step = model(tokens()[:, -1:], past_key_values=model(tokens()[:, :-1]).past_key_values).logits[:, 0]
    assert step.dtype == dtype
    close(step.float(), full.float(), atol=0.1 * full.abs().max().item(), rtol=0)
