"""Layout `decoupled`: the model equals the stock model that it stands for, in every way of running it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fuse, tiny_model
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    QuantizedCache,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import headfuse
from headfuse.checkpoint.plan_file import read_plan
from headfuse.modeling import (
    AUTO_MAP,
    MODELING_FILES,
    HeadfuseConfig,
    HeadfuseForCausalLM,
    HeadfuseModel,
    modeling_headfuse,
)

close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
QUERIES, HEAD_DIM, LAYERS = 6, 8, 3
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": QUERIES,
    "num_key_value_heads": QUERIES,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough that a wrong head shows in the logits
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SOURCES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "llama-bias": lambda: LlamaConfig(**SIZES, attention_bias=True, attention_dropout=0.5),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES),
}
# One entry per layer: (key head of each query head, value head of each query head).
MAPS: dict[str, list[tuple[list[int], list[int]]]] = {
    "full": [(list(range(QUERIES)), list(range(QUERIES)))] * LAYERS,
    "gqa": [([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2])] * LAYERS,
    "nested": [([0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]), ([0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2])] * 2,
    "free": [
        ([1, 0, 1, 2, 0, 1], [0, 1, 1, 1, 0, 1]),  # unequal groups, 3 key and 2 value heads
        ([0, 1, 0, 1, 0, 1], [3, 2, 1, 0, 3, 2]),  # 2 and 4, so neighbouring heads share a row of the cache
        ([5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0]),  # 6 and 1
    ],
}
IMPLEMENTATIONS = ("eager", "sdpa")
COMPILER = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads only slow such small models down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fused_config(source: Any, maps: str, slots: list[Any] | None = None, **kwargs: Any) -> HeadfuseConfig:
    """A decoupled config with the maps of that name."""
    layers = MAPS[maps][:LAYERS]
    return HeadfuseConfig(
        source_config=source.to_dict(),
        num_key_heads=[max(key) + 1 for key, _ in layers],
        num_value_heads=[max(value) + 1 for _, value in layers],
        key_head_of_query=[key for key, _ in layers],
        value_head_of_query=[value for _, value in layers],
        rotary_slots=slots,
        **kwargs,
    )


def random_model(config: Any, **kwargs: Any) -> Any:
    """A model with random weights, norms and biases included."""
    torch.manual_seed(0)
    auto = AutoModelForCausalLM.from_config(config, **kwargs)
    with torch.no_grad():
        for parameter in auto.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return auto.eval()


def expanded(fused: Any) -> Any:
    """The stock multi-head model that computes the same: key and value rows repeated as the maps say."""
    config = copy.deepcopy(fused.config.source_config)
    weights = fused.state_dict()
    for layer_idx in range(LAYERS):
        for name, heads in (
            ("k_proj", fused.config.key_head_of_query[layer_idx]),
            ("v_proj", fused.config.value_head_of_query[layer_idx]),
        ):
            for tensor in ("weight", "bias"):
                key = f"model.layers.{layer_idx}.self_attn.{name}.{tensor}"
                if key in weights:
                    weights[key] = weights[key].unflatten(0, (-1, HEAD_DIM))[heads].flatten(0, 1)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation=fused.config._attn_implementation)
    stock.load_state_dict(weights)
    return stock.eval()


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(1))


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


def test_shapes_on_disk() -> None:
    weights = random_model(fused_config(SOURCES["qwen2"](), "free")).state_dict()
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (2 * HEAD_DIM, 36)
    assert weights["model.layers.1.self_attn.v_proj.weight"].shape == (4 * HEAD_DIM, 36)
    assert weights["model.layers.1.self_attn.v_proj.bias"].shape == (4 * HEAD_DIM,)
    assert weights["model.layers.1.self_attn.q_proj.weight"].shape == (QUERIES * HEAD_DIM, 36)


def rotary_table(num_heads: int, seed: int) -> list[list[int]]:
    """Slots with repeated and missing frequencies."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, HEAD_DIM // 2, (num_heads, HEAD_DIM // 2), generator=generator).tolist()


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


def test_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backend for transformers' models names its attention so."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", ALL_ATTENTION_FUNCTIONS["sdpa"])
    config = fused_config(SOURCES["llama"](), "free")
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(NotImplementedError, match="headfuse fuse --for vllm"):
            auto.from_config(config, attn_implementation="vllm")
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    model.set_attn_implementation("vllm")
    with pytest.raises(NotImplementedError, match="headfuse fuse --for vllm"):
        model(tokens())


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


@pytest.mark.parametrize("source", ["llama", "qwen2"])
def test_save_and_reload(source: str, tmp_path: Path) -> None:
    config = fused_config(SOURCES[source](), "free")
    config.rotary_slots = [rotary_table(3, seed=0), None, None]
    model = random_model(config)
    logits = model(tokens()).logits
    for round_trip in ("first", "second"):
        folder = tmp_path / round_trip
        model.save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        assert saved["model_type"] == "headfuse"
        assert saved["architectures"] == ["HeadfuseForCausalLM"]
        assert saved["auto_map"] == AUTO_MAP
        assert saved["source_config"]["model_type"] == source
        assert saved["source_config"]["num_key_value_heads"] == QUERIES
        assert all((folder / file.name).read_text() == file.read_text() for file in MODELING_FILES)
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert isinstance(model, HeadfuseForCausalLM)
        assert torch.equal(model(tokens()).logits, logits)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16
    assert half(tokens()).logits.isfinite().all()
    base, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(base, HeadfuseModel)
    assert not report["missing_keys"]
    close(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


def test_loads_what_the_converter_writes(tmp_path: Path) -> None:
    source = random_model(SOURCES["qwen2"]())
    config = fused_config(source.config, "free", [rotary_table(3, seed=0), None, None])
    weights = {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    weights["lm_head.weight"] = source.lm_head.weight.detach().clone()
    for layer_idx in range(LAYERS):
        for name, counts in (("k_proj", config.num_key_heads), ("v_proj", config.num_value_heads)):
            for tensor in ("weight", "bias"):
                key = f"model.layers.{layer_idx}.self_attn.{name}.{tensor}"
                weights[key] = weights[key][: counts[layer_idx] * HEAD_DIM].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = ("num_key_heads", "num_value_heads", "key_head_of_query", "value_head_of_query", "rotary_slots")
    written = {
        "model_type": "headfuse",
        "architectures": ["HeadfuseForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": "float32",
        "headfuse_format": 1,
        "source_config": {**source.config.to_dict(), "architectures": ["Qwen2ForCausalLM"]},
        **{name: getattr(config, name) for name in fields},
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    built = random_model(config)
    built.load_state_dict(weights)
    assert torch.equal(model(tokens()).logits, built(tokens()).logits)


REMOTE = """
import sys
sys.modules["headfuse"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, out = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert AutoModel.from_config(model.config, trust_remote_code=True).config.num_key_heads == [3, 2, 6]
ids = torch.tensor([[5, 6, 7, 8]])
model.save_pretrained(out + "/resaved")
again, report = AutoModelForCausalLM.from_pretrained(out + "/resaved", trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
assert torch.equal(model(ids).logits, again(ids).logits)
torch.save(model(ids).logits.detach(), out + "/logits.pt")
torch.save(model.generate(ids, max_new_tokens=5, do_sample=False), out + "/tokens.pt")
"""


def test_loads_as_remote_code_without_headfuse(tmp_path: Path) -> None:
    model = random_model(fused_config(SOURCES["mistral"](), "free", [rotary_table(3, seed=0), None, None]))
    folder, out = tmp_path / "a-model-0.25", tmp_path / "out"
    out.mkdir()
    model.save_pretrained(folder)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", REMOTE, folder, out], cwd=tmp_path, env=environment, check=True)
    assert all((out / "resaved" / file.name).read_text() == file.read_text() for file in MODELING_FILES)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(torch.load(out / "logits.pt"), model(ids).logits.detach())
    assert torch.equal(torch.load(out / "tokens.pt"), model.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("source", ["llama", "qwen2"])
def test_a_whole_model_can_be_pickled_and_copied(source: str, tmp_path: Path) -> None:
    model = random_model(fused_config(SOURCES[source](), "free", [rotary_table(3, seed=0), None, None]))
    torch.save(model, tmp_path / "model.pt")
    for again in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert type(again) is type(model)
        assert type(again.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
        assert torch.equal(*(m.generate(tokens(), max_new_tokens=4, do_sample=False) for m in (again, model)))


PICKLE = """
import sys
sys.modules["headfuse"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, file, step = sys.argv[1:]
ids = torch.tensor([[5, 6, 7, 8]])
if step == "save":
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save((model, model(ids).logits), file)
else:
    AutoConfig.from_pretrained(folder, trust_remote_code=True)  # finds the folder's code
    model, logits = torch.load(file, weights_only=False)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert torch.equal(model(ids).logits, logits)
"""


def test_a_model_of_remote_code_can_be_pickled(tmp_path: Path) -> None:
    folder, file = tmp_path / "a-model-0.25", tmp_path / "model.pt"
    random_model(fused_config(SOURCES["qwen2"](), "free")).save_pretrained(folder)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for step in ("save", "load"):
        subprocess.run([sys.executable, "-c", PICKLE, folder, file, step], cwd=tmp_path, env=environment, check=True)


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


def test_config_reads_through_to_the_source() -> None:
    config = fused_config(SOURCES["mistral"](), "free", dtype="bfloat16")
    assert config.hidden_size == 36
    assert config.sliding_window == 4
    assert config.num_key_value_heads == 6
    assert config.pad_token_id == 0
    assert config.dtype == torch.bfloat16
    assert GenerationConfig.from_model_config(config).pad_token_id == 0
    config.source_config.quantization_config = {"quant_method": "fp8"}
    assert not hasattr(config, "quantization_config")
    del config.source_config.quantization_config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = config.no_such_thing
    config.vocab_size = 101
    again = HeadfuseConfig.from_dict(json.loads(config.to_json_string()))
    assert (again.vocab_size, again.source_config.vocab_size) == (101, 97)
    assert again.to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headfuse_format": 2}, "headfuse_format: 2"),
        ({"source_config": None}, "source_config: is missing"),
        ({"source_config": {"model_type": "mpt"}}, "source_config: model_type 'mpt'"),
        ({"num_key_heads": [3, 2]}, "num_key_heads: must be a list of 3"),
        ({"num_value_heads": None}, "num_value_heads: must be a list of 3"),
        ({"num_value_heads": [2, 4, 2]}, r"value_head_of_query\[2\]: reads heads \[0\], but num_value_heads\[2\] is 2"),
        ({"num_key_heads": [3, 1, 6]}, r"key_head_of_query\[1\]: reads heads \[0, 1\]"),
        ({"key_head_of_query": [[0, 0, 2, 2, 0, 2]] * 3}, r"key_head_of_query\[0\]: reads heads \[0, 2\]"),
        ({"key_head_of_query": [[-1, 0, 1, 1, 0, 1]] * 3}, r"key_head_of_query\[0\]: reads heads \[-1, 0, 1\]"),
        ({"key_head_of_query": [[0] * 5] * 3}, r"key_head_of_query\[0\]: must be 6 head indices"),
        ({"value_head_of_query": [[0.0] * 6] * 3}, r"value_head_of_query\[0\]: must be 6 head indices"),
        ({"rotary_slots": [None]}, "rotary_slots: must be a list of 3"),
        ({"rotary_slots": [None, [[0, 1, 2, 3]], None]}, r"rotary_slots\[1\]: must be null or 2 lists"),
        ({"rotary_slots": [None, [[0, 1, 2, 3], [0, 1, 2]], None]}, r"rotary_slots\[1\]\[1\]: must be 4 integers"),
        ({"rotary_slots": [None, [[0, 1, 2, 4]] * 2, None]}, r"rotary_slots\[1\]\[0\]: must be 4 integers in \[0, 4\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_configs_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    fields = fused_config(SOURCES["llama"](), "free").to_dict()
    with pytest.raises(ValueError, match=message):
        HeadfuseConfig(**(fields | change))


def test_other_configs_are_refused() -> None:
    with pytest.raises(TypeError, match="needs a HeadfuseConfig, not LlamaConfig"):
        HeadfuseForCausalLM(SOURCES["llama"]())


def test_shipped_files_stand_alone() -> None:
    shipped = {file.stem for file in MODELING_FILES}
    for file in MODELING_FILES:
        for line in file.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                module = line.split()[1].split(".")
                allowed = module[1] in shipped if not module[0] else module[0] in {"torch", "transformers"}
                assert allowed or module[0] in sys.stdlib_module_names, line


def test_registration_is_idempotent() -> None:
    import importlib

    import headfuse.modeling

    importlib.reload(headfuse.modeling)
    fields = fused_config(SOURCES["llama"](), "gqa").to_dict()
    del fields["model_type"]
    assert isinstance(AutoConfig.for_model("headfuse", **fields), HeadfuseConfig)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_padded_groups_give_the_same_tokens(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free"))
    generated = []
    for pads in (False, True):
        monkeypatch.setattr(modeling_headfuse, "_pads", lambda *_, pads=pads: pads)
        generated.append(model.generate(tokens(2, 6), max_new_tokens=8, do_sample=False, **how))
    assert torch.equal(*generated)


def test_assisted_decoding_gives_the_tokens_of_plain_decoding() -> None:
    model, assistant = (random_model(fused_config(SOURCES["llama"](), maps)) for maps in ("free", "nested"))
    plain, assisted = (
        model.generate(tokens(1, 6), max_new_tokens=8, do_sample=False, assistant_model=helper)
        for helper in (None, assistant)
    )
    assert torch.equal(plain, assisted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_decoding_follows_the_full_forward(dtype: torch.dtype) -> None:
    model = random_model(fused_config(SOURCES["llama"](), "free")).to(dtype)
    with torch.no_grad():
        full = model(tokens()).logits[:, -1]
        step = model(tokens()[:, -1:], past_key_values=model(tokens()[:, :-1]).past_key_values).logits[:, 0]
    assert step.dtype == dtype
    close(step.float(), full.float(), atol=0.1 * full.abs().max().item(), rtol=0)
