"""One decode step's attention on a GPU: every layout against FlashAttention on the source's heads, in bfloat16.

Times are those of the device: the steps of a race are captured into a CUDA graph, so that starting kernels from Python
costs nothing, and caches take turns until none is left in the card's own cache. Weights and maps are random; speed does
not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from itertools import cycle
from statistics import median
from typing import Any

import torch
from decode import fused_config, layer_config, random_model
from decode_latent import latent_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BUDGETS = ("1/2", "1/4", "1/8")
COLD_BYTES = 2**29
"""Caches take turns until they are this large together: several times what the card keeps of its memory by itself."""
ROUNDS = 5
Step = Callable[[], object]


def decode_table(queries: int, kv_heads: int, head_dim: int, cases: list[tuple[int, int]]) -> list[str]:
    """Rows of a table for one layer of a shape.

    Args:
        queries: query heads.
        kv_heads: key heads, and value heads.
        head_dim: channels of a head.
        cases: batch and context of each row.
    """
    names = [f"{layout} {budget}" for budget in BUDGETS for layout in ("gqa", "decoupled", "latent")]
    lines = [
        f"| batch | context | source, us | GB/s | SDPA | {' | '.join(names)} |",
        "|---|---|" + "---|" * (3 + len(names)),
    ]
    for batch, context in cases:
        times = {}
        for name, step, count in rivals(queries, kv_heads, head_dim, batch, context):
            times[name] = microseconds(step, count)
        source = times.pop("source")
        size = 2 * kv_heads * head_dim * 2 * batch * context
        cells = [f"{times[name] / source:.2f}" if name in times else "" for name in ("SDPA", *names)]
        lines.append(f"| {batch} | {context:,} | {source:.0f} | {size / source / 1e3:,.0f} | {' | '.join(cells)} |")
    return lines


def rivals(queries: int, kv_heads: int, head_dim: int, batch: int, context: int) -> Iterator[tuple[str, Step, int]]:
    """Name, step and the number of steps that go through all of its caches; one rival is on the device at a time."""
    query = torch.randn(batch, queries, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    for name, backend in (("source", SDPBackend.FLASH_ATTENTION), ("SDPA", None)):
        yield name, *stock(query, kv_heads, context, backend)
    for budget in BUDGETS:
        total = round(float(Fraction(budget)) * 2 * kv_heads)
        if total >= 2:
            yield f"gqa {budget}", *stock(query, total // 2, context, SDPBackend.FLASH_ATTENTION)
            few = max(1, total // 4)
            config = fused_config(layer_config(queries, head_dim, kv_heads, 32), [(few, total - few)])
            yield f"decoupled {budget}", *fused(config, query, (few, total - few), head_dim, context)
        width = round(float(Fraction(budget)) * kv_heads * head_dim)
        config = latent_config(layer_config(queries, head_dim, kv_heads, 32), kv_heads, head_dim, width)
        yield f"latent {budget}", *fused(config, query, (1, 1), width, context)


def stock(query: torch.Tensor, kv_heads: int, context: int, backend: SDPBackend | None) -> tuple[Step, int]:
    """torch's SDPA on as many KV heads, by a backend of its choice or by this one."""
    caches, count = filled(query, (kv_heads, kv_heads), query.shape[-1], context)
    grouped = kv_heads != query.shape[1]

    def step() -> object:
        key, value = next(caches)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, enable_gqa=grouped)

    return step, count


def fused(config: Any, query: torch.Tensor, heads: tuple[int, int], width: int, context: int) -> tuple[Step, int]:
    """The shipped model code on a layer with so many key heads and value heads of a width."""
    attention = random_model(config).model.layers[0].self_attn.to("cuda", torch.bfloat16)
    attention.reset_tables()
    caches, count = filled(query, heads, width, context)
    return (lambda: attention.attend_once(query, *next(caches), None)), count


def filled(
    query: torch.Tensor, heads: tuple[int, int], width: int, context: int
) -> tuple[Iterator[tuple[torch.Tensor, ...]], int]:
    """Random keys and values in turn, and how many of them there are."""
    shapes = [(len(query), count, context, width) for count in heads]
    size = sum(torch.Size(shape).numel() for shape in shapes) * query.itemsize
    count = -(-COLD_BYTES // size)
    states = [tuple(torch.randn(s, device=query.device, dtype=query.dtype) for s in shapes) for _ in range(count)]
    return cycle(states), count


@torch.no_grad()
def microseconds(step: Step, count: int) -> float:
    """Time of one step on the device: the median of rounds through all caches, captured as one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(count):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            step()
    graph.replay()
    return median(_replayed(graph) for _ in range(ROUNDS)) / count


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1000
