#!/usr/bin/env python3
"""What a GPU does with headfuse: `python benchmarks/gpu.py [PART ...]`, within half an hour, and writes docs/gpu.md.

With a GPU every part is measured: the tests of tests/devices, `fuse` on random models of two shapes, a short `uptrain`,
and torch's SDPA over one token, on the KV heads of the source and on a quarter of them. Without one, `fuse` of a single
layer is counted on a pretended device (tests/support/pretended_cuda), and what the counts predict is written instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import pretended_cuda  # noqa: E402
from tests.support.pretended_cuda import Transfers  # noqa: E402
from tests.support.tiny_models import tiny_model  # noqa: E402

PARTS = ("suite", "fuse", "decode", "uptrain")
PRESETS = ("fast", "balanced", "best")
SAMPLES, LENGTH = 8, 512
"""The text of a counted layer."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    def narrower(self, by: int) -> Shape:
        """The same heads, fewer of them, in narrower layers."""
        parts = (self.hidden, self.heads, self.kv_heads, self.intermediate)
        hidden, heads, kv_heads, intermediate = (part // by for part in parts)
        return Shape(self.layers, hidden, heads, kv_heads, intermediate, self.vocabulary)


SHAPES = {
    "Llama-2-7B": Shape(32, 4096, 32, 32, 11008, 32000),
    "Llama-3-8B": Shape(32, 4096, 32, 8, 14336, 128256),
}


@dataclass(frozen=True)
class Card:
    """What a card reaches: operations a second of products by dtype, bytes a second of copies, seconds of a wait."""

    float32: float
    float64: float
    bfloat16: float
    copies: float = 7e9
    wait: float = 2e-5
    launch: float = 6e-6


CARDS = {
    "H100": Card(50e12, 45e12, 450e12),
    "A100": Card(17e12, 15e12, 230e12, 6e9),
    "RTX 4090": Card(55e12, 1.2e12, 140e12, 8e9),
}
"""Assumed, not measured: what their kernels are known to reach, pageable copies."""


def random_model(folder: Path, shape: Shape, layers: int | None = None) -> Path:
    """A random Llama of a shape in float16, with a tokenizer of 300 tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = tiny_model(folder / "small")
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=4096, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    finally:
        torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(small).save_pretrained(folder / "model")
    return folder / "model"


def fused(model: Path, output: Path, preset: str, samples: int) -> float:
    """Fuse a model on the device; seconds."""
    import headfuse

    began = time.monotonic()
    headfuse.fuse(
        model, budget=0.25, preset=preset, device="cuda", samples=samples, sequence_length=LENGTH, data="default",
        output=output, overwrite=True,
    )  # fmt: skip
    return time.monotonic() - began


def counted(shape: Shape, preset: str) -> dict[str, Any]:
    """What is copied, waited for and computed for one layer of a shape, its vocabulary that of the tokenizer."""
    layer = Shape(1, shape.hidden, shape.heads, shape.kv_heads, shape.intermediate, 300)
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model(Path(scratch), layer)
        with Transfers() as count:
            fused(model, Path(scratch, "fused"), preset, SAMPLES)
        written = sum(path.stat().st_size for path in Path(scratch, "fused").glob("*.safetensors"))
    head = shape.hidden // shape.heads
    attention = 2 * shape.hidden * (shape.heads + shape.kv_heads) * head
    stored = 2 * (attention + 3 * shape.hidden * shape.intermediate)
    return {**count.report(), "layer_bytes": stored, "written_bytes": written, "preset": preset}


def predicted(report: Mapping[str, Any], card: Card) -> float:
    """Seconds of one layer on a card, by the counts; work on the host left out."""
    rates = {"float32": card.float32, "float64": card.float64, "complex128": card.float64, "bfloat16": card.bfloat16}
    work = {name.removeprefix("cuda "): amount for name, amount in report["work"].items() if name.startswith("cuda")}
    products = sum(amount / rates.get(dtype, card.float32) for dtype, amount in work.items())
    copies = report["copies"]
    moved = sum(copies[kind]["bytes"] for kind in ("to device", "to host") if kind in copies) / card.copies
    waits = sum(each["times"] for each in copies.values()) * card.wait
    return float(products + moved + waits + report["launches"].get("cuda", 0) * card.launch)


def decode_steps(shape: Shape, contexts: tuple[int, ...] = (4096, 16384, 65536)) -> list[str]:
    """Rows of a table: microseconds of one layer's SDPA over one token, stock and on a quarter of the key heads."""
    head, kept, rows = shape.hidden // shape.heads, max(1, shape.kv_heads // 4), list[str]()
    for context in contexts:
        times = []
        for kv_heads in (shape.kv_heads, kept):
            q = torch.randn(1, shape.heads, 1, head, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.randn(1, kv_heads, context, head, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            times.append(_microseconds(partial(scaled_dot_product_attention, q, k, v, enable_gqa=True)))
        rows.append(f"| {context:,} | {times[0]:.0f} | {times[1]:.0f} |")
    return rows


def _microseconds(work: Callable[[], object], runs: int = 50) -> float:
    for _ in range(5):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(runs):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / runs * 1000


def trained(model: Path, output: Path, shape: Shape) -> str:
    """Train the attention of a model towards itself; tokens per second, and their share of the peak of bfloat16."""
    import headfuse

    result = headfuse.uptrain(
        model, teacher=str(model), data="default", tokens=16 * 2048, batch_size=4, sequence_length=LENGTH,
        train="attention", device="cuda", output=output, overwrite=True,
    )  # fmt: skip
    layer = 2 * shape.hidden**2 * (1 + shape.kv_heads / shape.heads) + 3 * shape.hidden * shape.intermediate
    flops = 2 * shape.layers * layer * 4  # the teacher, and the student forwards and backwards
    peak = next((card.bfloat16 for name, card in CARDS.items() if name in torch.cuda.get_device_name()), None)
    share = "" if peak is None else f", {result.tokens_per_second * flops / peak:.0%} of the card's products"
    return f"{result.tokens_per_second:,.0f} tokens/s{share}"


def measure(parts: list[str], shapes: list[str]) -> list[str]:
    """The document of a machine with a GPU."""
    lines = [f"Measured on {torch.cuda.get_device_name()} by `python benchmarks/gpu.py`.", ""]
    if "suite" in parts:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/devices"], cwd=ROOT, capture_output=True)
        lines += [f"`pytest tests/devices`: {done.stdout.decode().strip().splitlines()[-1]}", ""]
    for name in shapes:
        shape = SHAPES[name]
        lines += [f"## {name}, random weights", ""]
        with tempfile.TemporaryDirectory() as scratch:
            model, output = random_model(Path(scratch), shape), Path(scratch, "fused")
            for preset in PRESETS if "fuse" in parts else ():
                lines.append(f"- `fuse --preset {preset}`, 64 x {LENGTH}: {fused(model, output, preset, 64):.0f} s")
            if "uptrain" in parts:
                lines.append(f"- `uptrain --train attention`: {trained(model, Path(scratch, 'trained'), shape)}")
        if "decode" in parts:
            lines += ["", "| context | SDPA, stock, us a layer | a quarter of the KV heads |", "|---|---|---|"]
            lines += decode_steps(shape)
        lines.append("")
    return lines


def predict(shapes: list[str], presets: list[str], divide: int) -> list[str]:
    """The document of a machine without a GPU."""
    command = (
        f"python benchmarks/gpu.py --shape {' '.join(map(repr, shapes))} --preset {' '.join(presets)} --divide {divide}"
    )
    lines = [
        f"Predicted by `{command}`: no GPU was there.",
        f"One layer of 1/{divide} of the width, {SAMPLES} x {LENGTH} tokens, was counted on a pretended device.",
        "Seconds are the counts over what the cards are assumed to reach (`CARDS` there),",
        "without files and work on the host. Random weights lose nothing that `balanced` would refine: its steps are",
        "not in the counts, but in tests/devices/test_transfers.py.",
        "",
        "| layer of | preset | up, over the layer's bytes | down, over what is written | waits | host's float64 | "
        + " | ".join(f"{card}, s" for card in CARDS) + " |",
        "|" + "---|" * (6 + len(CARDS)),
    ]  # fmt: skip
    for name in shapes:
        for preset in presets:
            lines.append(_row(name, counted(SHAPES[name].narrower(divide), preset)))
    return lines


def _row(name: str, report: Mapping[str, Any]) -> str:
    copies, work = report["copies"], report["work"]
    up, down = copies["to device"]["bytes"], copies["to host"]["bytes"]
    waits = sum(each["times"] for kind, each in copies.items() if kind != "to device")
    host = sum(amount for kind, amount in work.items() if kind in ("cpu float64", "cpu complex128"))
    seconds = " | ".join(f"{predicted(report, card):.2f}" for card in CARDS.values())
    shares = f"{up / report['layer_bytes']:.2f} | {down / report['written_bytes']:.2f}"
    return f"| {name} | {report['preset']} | {shares} | {waits:,} | {host / sum(work.values()):.2%} | {seconds} |"


def main() -> None:
    """Measure or predict, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--preset", nargs="+", default=["fast", "balanced"], choices=PRESETS, help="without a GPU")
    parser.add_argument("--divide", type=int, default=1, help="without a GPU: count a layer this much narrower")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu.md")
    options = parser.parse_args()
    if torch.cuda.is_available():
        lines = measure(list(options.part), options.shape)
    else:
        pretended_cuda.start()
        lines = predict(options.shape, options.preset, options.divide)
    text = "\n".join(["# On a GPU", *lines]).rstrip() + "\n"
    options.output.write_text(text, encoding="utf-8")
    print(text, json.dumps({"written": str(options.output)}), sep="\n")


if __name__ == "__main__":
    main()
