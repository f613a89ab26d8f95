#!/usr/bin/env python3
"""What a GPU does with headfuse: `python benchmarks/gpu.py [PART ...]`, within half an hour, and writes docs/gpu.md.

With a GPU every part is measured: the tests of tests/devices; `fuse` on random models of two shapes, its time by stage
beside what counts on paper predict; one decode step's attention of every layout (gpu_decode.py); a short `uptrain`.
Without one, `fuse` of a single layer is counted on a pretended device (tests/support/pretended_cuda), and what the
counts predict is written instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from gpu_counts import predict
from gpu_decode import decode_table
from gpu_models import LENGTH, ROOT, SHAPES, Shape, fused, random_model, refining_random_weights

from tests.support import pretended_cuda

PARTS = ("suite", "fuse", "uptrain", "decode")
SAMPLES = 64
"""Windows of the text that a model is fused on."""
STAGES = ("survey", "fuse", "refine", "files")
RUNS = (("fast", "float32"), ("balanced", "float32"), ("balanced", "bfloat16"), ("best", "float32"))
"""Presets, and what layers multiply in."""
TRAINED_STEPS = 16
DECODED = [(1, 4096), (1, 16384), (1, 65536), (16, 4096)]
"""Batch and context of the decode steps."""


def trained(model: Path, source: Path, output: Path, shape: Shape, count: int) -> str:
    """Train the attention of a fused model of `count` layers: tokens a second of the median step, and its share of the
    card's peak."""
    import headfuse
    from headfuse.training.footprint import PEAKS, peak_flops

    torch.cuda.reset_peak_memory_stats()
    ends = list[float]()
    headfuse.uptrain(
        model, teacher=str(source), data="default", tokens=TRAINED_STEPS * 8 * LENGTH, batch_size=8,
        sequence_length=LENGTH, train="attention", device="cuda", output=output, overwrite=True,
        on_progress=lambda progress: ends.append(time.monotonic()),
    )  # fmt: skip
    speed = 8 * LENGTH / statistics.median(end - start for start, end in itertools.pairwise(ends))
    attention = shape.hidden**2 * (2 + 2 * shape.kv_heads / shape.heads)
    kept = shape.hidden**2 * (2 + 2 * shape.kv_heads / shape.heads / 4)  # of a quarter of the cache
    rest = 3 * shape.hidden * shape.intermediate
    head = shape.vocabulary * shape.hidden
    # The teacher forwards; the student forwards, backwards towards its inputs and, in its attention, the weights.
    flops = 2 * (count * (attention + rest + 3 * kept + 2 * rest) + 3 * head)
    peak = peak_flops(torch.device("cuda")) or PEAKS["H100"]
    share = f", {speed * flops / peak:.0%} of the card's peak in bfloat16"
    memory = torch.cuda.max_memory_allocated() / 1e9
    return f"{speed:,.0f} tokens/s{share}, {memory:.0f} GB"


def measure(
    parts: Sequence[str], shapes: Sequence[str], presets: Sequence[str], products: Sequence[str], layers: int | None
) -> Iterator[str]:
    """The document of a machine with a GPU, line by line."""
    yield from (f"Measured on one {torch.cuda.get_device_name()} by `python benchmarks/gpu.py`, with", "")
    yield f"torch {torch.__version__} and transformers {transformers.__version__}."
    if "suite" in parts:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/devices"], cwd=ROOT, capture_output=True, text=True
        )
        yield from ("", f"`pytest tests/devices` on the card: {done.stdout.strip().splitlines()[-1].strip('= ')}")
    for name in shapes:
        shape = SHAPES[name]
        yield from ("", f"## {name}", "")
        with tempfile.TemporaryDirectory() as scratch:
            if "fuse" in parts or "uptrain" in parts:
                yield from _measured_model(Path(scratch), shape, parts, presets, products, layers)
        if "decode" in parts:
            yield from decode_table(shape.heads, shape.kv_heads, shape.hidden // shape.heads, DECODED)


def _measured_model(
    scratch: Path,
    shape: Shape,
    parts: Sequence[str],
    presets: Sequence[str],
    products: Sequence[str],
    layers: int | None,
) -> Iterator[str]:
    model = random_model(scratch, shape, layers)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    count = layers or shape.layers
    text = f"{SAMPLES} x {LENGTH} tokens, a quarter of the cache"
    yield f"Random weights, {count} layers, {size / 1e9:.1f} GB in float16; {text}."
    if "fuse" in parts:
        columns = ["preset", "products in", *(f"{stage}, s" for stage in STAGES), "all, s", "GPU, GB"]
        yield from ("", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
    for preset, dtype in RUNS if "fuse" in parts else ():
        if preset in presets and dtype in products:
            torch.cuda.reset_peak_memory_stats()
            with refining_random_weights():
                seconds = fused(model, scratch / "fused", preset, SAMPLES, compute_dtype=dtype)
            memory = torch.cuda.max_memory_allocated() / 1e9
            cells = [f"{seconds.get(stage, 0):.0f}" for stage in STAGES]
            yield f"| {preset} | {dtype} | {' | '.join(cells)} | {sum(seconds.values()):.0f} | {memory:.0f} |"
    if "uptrain" in parts:
        if not (scratch / "fused").exists():
            fused(model, scratch / "fused", "fast", 8)
        reached = trained(scratch / "fused", model, scratch / "trained", shape, count)
        yield from ("", f"`uptrain --train attention`, 8 x {LENGTH} tokens a step: {reached}.", "")


def main() -> None:
    """Measure or predict, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--preset", nargs="+", default=["fast", "balanced"], choices=["fast", "balanced", "best"])
    parser.add_argument("--products", nargs="+", default=["float32", "bfloat16"], help="what layers multiply in")
    parser.add_argument("--layers", type=int, help="with a GPU: a model of so many")
    parser.add_argument("--divide", type=int, default=1, help="without a GPU: count a layer this much narrower")
    parser.add_argument("--output", type=Path, help="by default docs/gpu.md; without a GPU none")
    options = parser.parse_args()
    lines, measured = ["# On a GPU"], torch.cuda.is_available()
    if measured:
        for line in measure(options.part, options.shape, options.preset, options.products, options.layers):
            print(line, flush=True)
            lines.append(line)
    else:
        pretended_cuda.start()
        lines += predict(options.shape, options.preset, options.divide)
        print("\n".join(lines))
    output = options.output or (ROOT / "docs" / "gpu.md" if measured else None)
    if output is not None:
        output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
        print(json.dumps({"written": str(output)}))


if __name__ == "__main__":
    main()
