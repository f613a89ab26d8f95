"""Speed of decoding with wide heads: `python benchmarks/decode_latent.py [--context 4096 16384]`.

One decode step's attention of a layer of layout latent against torch's SDPA on the source's own heads, in the same
run: the rivals take turns (benchmarks/decode.py), and beside the times stand the bytes that each reads and the
multiply-adds that each does. Weights, maps and slots are random; speed does not depend on them.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from decode import COLD_BYTES, LATENT, layer_config, random_caches, random_model
from rivals import milliseconds, paired, ratio
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headfuse.modeling.configuration_latent import LatentConfig

SHAPES = {"llama-2-7b": (32, 32, 128), "smollm2-135m": (9, 3, 64), "mha-6m": (8, 8, 32)}
"""Query heads, KV heads and head_dim of one layer of each model."""
INTRODUCTION = """\
Written by `python benchmarks/decode_latent.py --steps 41` from benchmarks/results/decode_latent.jsonl, then with
`--shape smollm2-135m mha-6m --reads 1` and with `--shape llama-2-7b --groups 4`: one layer's attention in a decode
step, relative to SDPA on the source's own heads. As above it is float32 on one thread; other work ran on the machine,
and the ratios are medians of paired runs. Every query head reads the whole width, so fewer bytes are not always less
time: at a half, a query head of mha-6m reads 128 channels, where its source reads 32, and one of Llama-2-7B 2,048
instead of 128.

- reads: so many other layers' caches are read beside the layer's own (as with `--cross-layer`), which takes no more
  memory and more time.
- groups: so many wide keys and values per layer, each of an equal part of the heads. A reviewed plan.json can have
  them: docs/experiments/wide-heads.md says what they cost.
"""


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--budget", nargs="+", default=["1/2", "1/4"])
    parser.add_argument("--context", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--reads", type=int, default=0, help="how many other layers a layer reads, as --cross-layer")
    parser.add_argument(
        "--groups", type=int, default=1, help="wide keys and values of a layer, for equal parts of its heads"
    )
    parser.add_argument("--max-mib", type=int, default=600, help="source caches above this are left out")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/decode_latent.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/decode.md"))
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for name in options.shape:
        queries, heads, head_dim = SHAPES[name]
        for batch in options.batch:
            for context in options.context:
                case = {"model": name, "batch": batch, "context": context, "budgets": options.budget}
                case |= {"reads": options.reads} if options.reads else {}
                case |= {"groups": options.groups} if options.groups > 1 else {}
                mib = 2 * heads * batch * context * head_dim * 4 / 2**20
                if mib > options.max_mib or case in [row["case"] for row in done]:
                    continue
                row = {"case": case, **race(queries, heads, head_dim, batch, context, options)}
                print(json.dumps(row), flush=True)
                done.append(row)
                options.results.parent.mkdir(exist_ok=True)
                with options.results.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
    before = options.page.read_text(encoding="utf-8").partition(LATENT)[0]
    options.page.write_text(f"{before}{LATENT}{INTRODUCTION}\n{table(done)}\n", encoding="utf-8")


def race(
    queries: int, heads: int, head_dim: int, batch: int, context: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One query's attention on a filled cache: the source's heads in SDPA, and one wide head at every budget."""
    query = torch.randn(batch, queries, 1, head_dim)
    layers = COLD_BYTES // (2 * heads * batch * context * head_dim * 4) + 1
    source = layer_config(queries, head_dim, heads, 32)
    stock = random_model(source).model.layers[0].self_attn
    own = random_caches(layers, batch, context, head_dim, heads, heads)
    rivals: dict[str, Callable[[], object]] = {
        "source": lambda: sdpa_attention_forward(stock, query, *next(own), None, scaling=stock.scaling)
    }
    work = {"source": 2 * queries * head_dim * context * batch}
    for budget in options.budget:
        width = round(float(Fraction(budget)) * heads * head_dim)
        config = latent_config(source, heads, head_dim, width, options.reads, options.groups)
        attention = random_model(config).model.layers[options.reads].self_attn
        caches = random_caches(layers + options.reads, batch, context, width, 1, 1)
        rivals[budget] = functools.partial(step, attention, query, caches, options.reads)
        work[budget] = 2 * queries * width // options.groups * context * batch * (1 + options.reads)
    times = paired(rivals, options.steps)
    return {
        "source_ms": milliseconds(times["source"]),
        "ratios": {budget: ratio(times, budget, "source") for budget in options.budget},
        "bytes": {
            name: 2
            * int(share * heads * head_dim)
            * 4
            * context
            * batch
            * (1 if name == "source" else 1 + options.reads)
            for name, share in shares(options)
        },
        "multiply_adds": work,
    }


def step(attention: Any, query: torch.Tensor, caches: Iterator[tuple[torch.Tensor, torch.Tensor]], reads: int) -> None:
    """One decode step's attention, with other layers' caches at hand as the model's forward pass hands them on."""
    attention.shared.update((layer, next(caches)) for layer in range(reads))
    attention.attend_once(query, *next(caches), None)


def shares(options: argparse.Namespace) -> list[tuple[str, float]]:
    """The share of the cache of every rival."""
    return [("source", 1.0), *((budget, float(Fraction(budget))) for budget in options.budget)]


def latent_config(source: Any, heads: int, head_dim: int, width: int, reads: int = 0, count: int = 1) -> LatentConfig:
    """Equal groups with `width` channels on each side in all, and every frequency as often as the next.

    The last one of `reads` + 1 equal layers reads all of them.
    """
    size, own, layers = heads // count, width // count, reads + 1
    slots = [slot * (head_dim // 2) // (own // 2) for slot in range(own // 2)]
    groups = [list(range(first, first + size)) for first in range(0, heads, size)]
    sources = [*([] for _ in range(reads)), list(range(reads))] if reads else None
    return LatentConfig(
        source_config={**source.to_dict(), "num_hidden_layers": layers, "layer_types": None}, headfuse_format=1,
        groups=[groups] * layers, key_widths=[[own] * count] * layers, value_widths=[[own] * count] * layers,
        rotary_slots=[[slots] * count] * layers, key_sources=sources, value_sources=sources,
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios of times, bytes and multiply-adds to those of the source."""
    lines = [
        "| layer of | batch | context | kept | reads | groups | source ms | time ratio | bytes | multiply-adds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row["case"]
        for budget in case["budgets"]:
            read, work = (row[name][budget] / row[name]["source"] for name in ("bytes", "multiply_adds"))
            lines.append(
                f"| {case['model']} | {case['batch']} | {case['context']} | {budget} | {case.get('reads', 0)} "
                f"| {case.get('groups', 1)} "
                f"| {row['source_ms']:.2f} "
                f"| {row['ratios'][budget]:.2f} | {read:.2f} | {work:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
