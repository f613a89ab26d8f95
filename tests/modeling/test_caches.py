"""Layout `decoupled`: decoding with every kind of cache."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

import headfuse
from headfuse.checkpoint.plan_file import read_plan
from headfuse.modeling import modeling_headfuse
from tests.modeling.random_models import (
    COMPILER,
    HEAD_DIM,
    IMPLEMENTATIONS,
    MAPS,
    QUERIES,
    SOURCES,
    close,
    expanded,
    fused_config,
    random_model,
    rotary_table,
    tokens,
)
from tests.support.commands import fuse
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("source", ["llama", "mistral", "qwen2"])
def test_cached_decoding_equals_the_full_forward(source: str, maps: str, implementation: str) -> None:
    config = fused_config(SOURCES[source](), maps)
    config.rotary_slots = [rotary_table(heads, seed) for seed, heads in enumerate(config.num_key_heads)]
    model = random_model(config, attn_implementation=implementation)
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :4], mask[2, :2] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        cache, steps = DynamicCache(config=config), []
        for start, stop in ((0, 5), (5, 7), *((step, step + 1) for step in range(7, 12))):
            step = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                output_attentions=implementation == "eager",
            )
            steps.append(step.logits)
            if implementation == "eager":
                assert all(weights.shape[:3] == (3, QUERIES, stop - start) for weights in step.attentions)
        close(torch.cat(steps, 1)[:, 4:], full.logits[:, 4:])


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past"])
def test_the_cache_is_known_under_each_of_its_names(name: str) -> None:
    """As decoder layers of all supported versions of transformers hand it over."""
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    attention, hidden = model.model.layers[0].self_attn, torch.randn(1, 7, 36)
    angles = model.model.rotary_emb(hidden, torch.arange(7)[None])
    cache, outputs = DynamicCache(config=model.config), []
    others = dict.fromkeys({"cache", "past_key_values", "layer_past"} - {name})
    harmless = {"cache_position": torch.arange(1), "use_cache": True, "past_length": 3}
    with torch.no_grad():
        for step in range(7):
            part = [states[:, step : step + 1] for states in (hidden, *angles)]
            outputs.append(attention(part[0], tuple(part[1:]), None, **{name: cache}, **others, **harmless)[0])
        close(torch.cat(outputs, 1), attention(hidden, angles, None)[0])
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [("kv_cache", DynamicCache()), ("states", DynamicCache()), ("past_key_value", (torch.ones(1), torch.ones(1)))],
)
def test_a_cache_under_an_unknown_name_is_refused(name: str, value: Any) -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    hidden = torch.randn(1, 7, 36)
    angles = model.model.rotary_emb(hidden, torch.arange(7)[None])
    with pytest.raises(TypeError, match=f"cache comes as the argument '{name}'"):
        model.model.layers[0].self_attn(hidden, angles, None, **{name: value})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("maps", ["gqa", "nested", "free"])
@pytest.mark.parametrize("source", ["llama", "mistral"])
def test_generate_gives_the_tokens_of_the_expanded_stock_model(
    source: str, maps: str, how: dict[str, Any], implementation: str
) -> None:
    fused = random_model(fused_config(SOURCES[source](), maps), attn_implementation=implementation)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    ours, theirs = (
        model.generate(tokens(2, 6), attention_mask=mask, max_new_tokens=8, do_sample=False, **how)
        for model in (fused, expanded(fused))
    )
    assert ours.shape == (2, 14)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=str)
def test_cache_tensors_have_the_promised_bytes(how: dict[str, Any]) -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    cache = model.generate(
        tokens(2, 6), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **how
    ).past_key_values
    cached_tokens = 2 * cache.layers[0].keys.shape[2]
    for layer_idx, layer in enumerate(cache.layers):
        assert layer.keys.nbytes == cached_tokens * model.config.num_key_heads[layer_idx] * HEAD_DIM * 4
        assert layer.values.nbytes == cached_tokens * model.config.num_value_heads[layer_idx] * HEAD_DIM * 4


@pytest.mark.parametrize("how", ["dynamic", "static"])
@pytest.mark.parametrize("counts", ["key_heads: [2, 1], value_heads: [2, 1]", "key_heads: [1, 3], value_heads: [3, 2]"])
def test_peak_cache_bytes_are_those_of_the_plan(counts: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(f"budget: {{{counts}}}\nmethod: mean\npreset: fast\n")
    fuse(tiny_model(tmp_path / "source"), tmp_path / "out", "--config", tmp_path / "options.yaml")
    model, held = headfuse.load(tmp_path / "out"), []
    static = StaticCache(config=model.config, max_cache_len=20)
    cache = static if how == "static" else DynamicCache(config=model.config)
    with torch.no_grad():
        for ids in (tokens(2, 6), *tokens(2, 5).split(1, dim=1)):
            model(ids, past_key_values=cache)
            held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    length = 20 if how == "static" else 11
    assert max(held) == 2 * length * read_plan(tmp_path / "out").kv_bytes_per_token(itemsize=4)


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_a_quantised_cache_gives_the_logits_of_the_expanded_stock_model(backend: str) -> None:
    fused = random_model(fused_config(SOURCES["llama"](), "free"))
    options: dict[str, Any] = {} if backend == "fp8" else {"nbits": 8 if backend == "hqq" else 4, "q_group_size": 8}
    if backend == "hqq":
        options |= {"axis_key": 1, "axis_value": 1}
    logits = []
    for model in (fused, expanded(fused)):
        try:
            cache = QuantizedCache(backend, config=model.config, **options)
        except (ImportError, ValueError) as error:  # a package or, in older transformers, the kind is missing
            pytest.skip(str(error))
        with torch.no_grad():
            model(tokens()[:, :-2], past_key_values=cache)
            logits += [model(tokens()[:, i : i + 1], past_key_values=cache).logits for i in (7, 8)]
    close(logits[:2], logits[2:])


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_gives_the_tokens_of_the_stock_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():  # layers still move, to where they are; only CUDA's streams are left out
        stream = type("Stream", (contextlib.nullcontext,), {"wait_stream": lambda *_: None})
        monkeypatch.setattr(torch, "Stream", stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda _: stream())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(fused_config(SOURCES["llama"](), "free")).to(device)
    plain, offloaded = (
        one.generate(tokens(2, 6).to(device), max_new_tokens=8, do_sample=False, cache_implementation=how)
        for one, how in ((expanded(model).to(device), None), (model, kind))
    )
    assert torch.equal(plain, offloaded)


def test_decoding_reads_every_cached_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    with torch.no_grad():
        cache = model(tokens()[:, :-1]).past_key_values
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        model(tokens()[:, -1:], past_key_values=cache)


def test_a_decoding_step_compiles_without_a_graph_break() -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    cache = StaticCache(config=model.config, max_cache_len=9)
    with torch.no_grad():
        full = model(tokens()).logits[:, -1]
        model(tokens()[:, :-1], past_key_values=cache)
        step = torch.compile(model, backend="eager", fullgraph=True)(tokens()[:, -1:], past_key_values=cache)
    close(step.logits[:, 0], full)


@pytest.mark.slow
@COMPILER
def test_decoding_steps_compiled_by_inductor() -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    cache = StaticCache(config=model.config, max_cache_len=9)
    step = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        full = model(tokens()).logits
        model(tokens()[:, :6], past_key_values=cache)
        steps = [step(ids, past_key_values=cache).logits for ids in tokens()[:, 6:].split(1, dim=1)]
    close(torch.cat(steps, 1), full[:, 6:])


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_padded_groups_give_the_same_tokens(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    generated = []
    for pads in (False, True):
        monkeypatch.setattr(modeling_headfuse, "pads", lambda *_, pads=pads: pads)
        generated.append(model.generate(tokens(2, 6), max_new_tokens=8, do_sample=False, **how))
    assert torch.equal(*generated)


def test_assisted_decoding_gives_the_tokens_of_plain_decoding() -> None:
    model, assistant = (random_model(fused_config(SOURCES["llama"](), maps)) for maps in ("free", "nested"))
    plain, assisted = (
        model.generate(tokens(1, 6), max_new_tokens=8, do_sample=False, assistant_model=helper)
        for helper in (None, assistant)
    )
    assert torch.equal(plain, assisted)
