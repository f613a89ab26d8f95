"""Speed of decoding: `python benchmarks/decode.py [--model NAME=FOLDER ...] [--gguf NAME SOURCE FUSED ...]`.

Three tables, each measured in pairs within one run: the rivals take turns step by step, times are medians and ratios
are medians of the quotients of neighbouring runs. Times are CPU times of the one thread that computes.

* attention: one decode step's attention alone, against torch's SDPA on a stock GQA layer with the same cache bytes;
* step: a whole decode step with a dynamic cache, against the source model;
* llama.cpp: tokens after a prompt, two GGUF files against each other (`headfuse export --to gguf`).

Heads, maps and rotary slots of the fused models are drawn at random, as free as the layout allows; speed does not
depend on the weights. Rows are appended to `benchmarks/results/decode.jsonl` one at a time, and those that are
there are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_page import PARTS, document
from rivals import milliseconds, paired, ratio
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headfuse.modeling import HeadfuseConfig

LAYER = "llama-2-7b, one layer"
"""A random layer of this shape, without embeddings and head to speak of."""
FLOOR = "floor"
"""The budget of one key head and one value head in every layer."""
SHAPES = {LAYER: (32, 128, (8, 4)), "smollm2": (9, 64, (3, 1)), "mha-6m": (8, 32, (2, 1))}
"""Query heads, head_dim and the KV heads of the stock GQA layers that fused layers of the same bytes race against."""
COLD_BYTES = 64 * 2**20
"""Layers take turns until their caches are this large, so that none is still in the processor's own cache."""

LATENT = "\n## Layout latent\n"
"""Where the part of the page begins that benchmarks/decode_latent.py writes."""


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--model", nargs="+", default=["mha-6m=examples/mha-6m"], help=f"NAME=FOLDER, or {LAYER!r}")
    parser.add_argument("--budget", nargs="+", default=["1/2", "1/4", FLOOR])
    parser.add_argument("--context", nargs="+", type=int, default=[512, 2048, 4096, 16384])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each rival")
    parser.add_argument("--max-mib", type=int, default=600, help="source caches above this are left out")
    parser.add_argument("--gguf", nargs=3, action="append", metavar=("NAME", "SOURCE", "FUSED"), default=[])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/decode.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/decode.md"))
    parser.add_argument("--draw", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    if not options.draw:
        known = {json.dumps(row["case"]) for row in done if "skipped" not in row}
        for part, rows in (("attention", attention_rows), ("step", step_rows), ("llama.cpp", gguf_rows)):
            for case, run in rows(options) if part in options.part else ():
                case = {"part": part, **case}
                if json.dumps(case) in known:
                    continue
                done.append({"case": case, **run()})
                print(json.dumps(done[-1]), flush=True)
                with options.results.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(done[-1]) + "\n")
    kept = options.page.read_text(encoding="utf-8").partition(LATENT)[1:] if options.page.exists() else ()
    options.page.write_text(document(done) + "".join(kept), encoding="utf-8")


Row = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def fused_config(source: Any, counts: list[tuple[int, int]]) -> HeadfuseConfig:
    """A decoupled config with these key and value heads per layer, random maps and random rotary slots."""
    draw = random.Random(0)
    queries = source.num_attention_heads
    planes = (getattr(source, "head_dim", None) or source.hidden_size // queries) // 2

    def head_map(heads: int) -> list[int]:
        read = [*range(heads), *(draw.randrange(heads) for _ in range(queries - heads))]
        draw.shuffle(read)
        return read

    return HeadfuseConfig(
        source_config=source.to_dict(),
        num_key_heads=[keys for keys, _ in counts],
        num_value_heads=[values for _, values in counts],
        key_head_of_query=[head_map(keys) for keys, _ in counts],
        value_head_of_query=[head_map(values) for _, values in counts],
        rotary_slots=[[[draw.randrange(planes) for _ in range(planes)] for _ in range(keys)] for keys, _ in counts],
    )


def random_model(config: Any) -> Any:
    """A float32 model on the CPU."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


def layer_config(queries: int, head_dim: int, kv_heads: int, intermediate_size: int) -> LlamaConfig:
    """One Llama layer behind a tiny vocabulary."""
    return LlamaConfig(
        vocab_size=32, hidden_size=queries * head_dim, intermediate_size=intermediate_size, num_hidden_layers=1,
        num_attention_heads=queries, num_key_value_heads=kv_heads,
    )  # fmt: skip


def attention_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Fused layers of equal and of unequal counts, for every stock layer of the same bytes."""
    for name, (queries, head_dim, stocks) in SHAPES.items():
        for kv_heads in stocks:
            counts = {(kv_heads, kv_heads), (max(1, kv_heads // 2), 2 * kv_heads - max(1, kv_heads // 2))}
            counts |= {(values, keys) for keys, values in counts}
            for batch in options.batch:
                for context in options.context:
                    size = 2 * kv_heads * batch * context * head_dim * 4
                    if size <= options.max_mib * 2**20:
                        case = {"model": name, "batch": batch, "context": context, "kv_heads": kv_heads}
                        shape = (queries, head_dim, kv_heads, batch, context)
                        yield case, partial(race_attention, shape, sorted(counts), options.steps)


def race_attention(shape: tuple[int, int, int, int, int], counts: list[tuple[int, int]], steps: int) -> dict[str, Any]:
    """Attention of one query on a filled cache: torch's SDPA as transformers calls it, and fused layers."""
    queries, head_dim, kv_heads, batch, context = shape
    query = torch.randn(batch, queries, 1, head_dim)
    layers = COLD_BYTES // (2 * kv_heads * batch * context * head_dim * 4) + 1
    stock = random_model(layer_config(queries, head_dim, kv_heads, 32)).model.layers[0].self_attn
    rivals: dict[str, Callable[[], object]] = {}
    caches = random_caches(layers, batch, context, head_dim, kv_heads, kv_heads)
    rivals["sdpa"] = lambda: sdpa_attention_forward(stock, query, *next(caches), None, scaling=stock.scaling)
    for keys, values in [(1, 1), *counts]:
        config = fused_config(layer_config(queries, head_dim, queries, 32), [(keys, values)])
        attention = random_model(config).model.layers[0].self_attn
        own = random_caches(layers, batch, context, head_dim, keys, values)
        rivals[f"{keys}+{values}"] = lambda f=attention.attend_once, c=own: f(query, *next(c), None)  # type: ignore[misc]
    times = paired(rivals, steps)
    fused = {f"{keys}+{values}": ratio(times, f"{keys}+{values}", "sdpa") for keys, values in counts}
    return {
        "bytes": 2 * kv_heads * batch * context * head_dim * 4,
        "sdpa_ms": milliseconds(times["sdpa"]),
        "ratios": fused,
        "floor": ratio(times, "1+1", "sdpa"),
    }


def random_caches(
    layers: int, batch: int, context: int, head_dim: int, keys: int, values: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values of as many layers, over and over."""
    shapes = ((batch, keys, context, head_dim), (batch, values, context, head_dim))
    return itertools.cycle([(torch.randn(shapes[0]), torch.randn(shapes[1])) for _ in range(layers)])


def step_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Every model at every context and batch, with all budgets in one race."""
    for model in options.model:
        name, _, folder = model.partition("=")
        config = AutoConfig.from_pretrained(folder) if folder else layer_config(32, 128, 32, 11008)
        loaded: list[Any] = []  # at the first row that is not known
        for batch in options.batch:
            for context in options.context:
                width = 2 * config.num_key_value_heads * (getattr(config, "head_dim", None) or 128) * 4
                if width * config.num_hidden_layers * batch * context <= options.max_mib * 2**20:
                    case = {"model": name, "batch": batch, "context": context, "budgets": options.budget}
                    yield case, partial(race_steps, loaded, config, folder, batch, context, options)


def race_steps(
    loaded: list[Any], config: Any, folder: str, batch: int, context: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Decode steps of the source and of models at every budget, each with a dynamic cache of `context` tokens."""
    if not loaded:
        source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() if folder else None
        loaded.append(source or random_model(config))
        for budget in options.budget:
            loaded.append(random_model(fused_config(config, head_counts(config, budget))))
    caches = [filled_cache(model, batch, context) for model in loaded]
    names = ["source", *options.budget]
    token = torch.ones(batch, 1, dtype=torch.long)
    held = {name: cache_bytes(cache) for name, cache in zip(names, caches, strict=True)}
    rivals: dict[str, Callable[[], object]] = {
        name: partial(model, token, past_key_values=cache)
        for name, model, cache in zip(names, loaded, caches, strict=True)
    }
    times = paired(rivals, options.steps)
    return {
        "bytes": held,
        "ms": {name: milliseconds(seconds) for name, seconds in times.items()},
        "ratios": {name: ratio(times, name, "source") for name in options.budget},
    }


def head_counts(config: Any, budget: str) -> list[tuple[int, int]]:
    """Key and value heads per layer: a quarter and three quarters of the budget, taking turns."""
    heads = config.num_key_value_heads
    total = 2 if budget == FLOOR else max(2, round(float(Fraction(budget)) * 2 * heads))
    few = min(max(1, total - heads, round(total / 4)), total // 2)
    return [
        (few, total - few) if layer_idx % 2 else (total - few, few) for layer_idx in range(config.num_hidden_layers)
    ]


def filled_cache(model: Any, batch: int, context: int) -> DynamicCache:
    """A dynamic cache of random keys and values."""
    config, cache = model.config, DynamicCache(config=model.config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fused = isinstance(config, HeadfuseConfig)
    for layer_idx in range(config.num_hidden_layers):
        keys = config.num_key_heads[layer_idx] if fused else config.num_key_value_heads
        values = config.num_value_heads[layer_idx] if fused else config.num_key_value_heads
        states = (torch.randn(batch, heads, context, head_dim) for heads in (keys, values))
        cache.update(*states, layer_idx)
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the cached keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def gguf_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Two GGUF files at every context, one sequence."""
    for name, source, fused in options.gguf:
        for context in options.context:
            files = {"source": Path(source), "fused": Path(fused)}
            yield {"model": name, "context": context}, partial(race_gguf, files, context, options)


def race_gguf(files: dict[str, Path], context: int, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens after a prompt of `context` tokens in llama.cpp, whose own timings are read; caches are float16."""
    try:
        import xllamacpp
    except ImportError:
        return {"skipped": "the wheel xllamacpp (llama.cpp) is not installed"}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        return {"skipped": f"there is no {missing[0]}"}
    answers: dict[str, list[float]] = {name: [] for name in files}
    servers = {}
    for name, path in files.items():
        common = xllamacpp.CommonParams()
        common.model.path, common.n_ctx, common.n_parallel, common.verbosity = str(path), context + 64, 1, 0
        common.warmup = common.fit_params = False
        common.cpuparams.n_threads = common.cpuparams_batch.n_threads = 1
        servers[name] = xllamacpp.Server(common)
    prompt = [random.Random(0).randrange(3, 1000) for _ in range(context)]
    for turn in range(options.steps // 3 + 1):
        for name, server in servers.items():
            request = {"prompt": prompt, "n_predict": 32, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
            answer = server.handle_completions(request)
            if turn:  # the first one reads the prompt
                answers[name].append(answer["timings"]["predicted_per_token_ms"] / 1e3)
    return {
        "ms": {name: milliseconds(times) for name, times in answers.items()},
        "ratio": ratio(answers, "fused", "source"),
    }


if __name__ == "__main__":
    main()
