"""What `fuse` copies, waits for and computes for one layer, counted on a pretended device, and what that predicts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_models import LENGTH, SHAPES, Shape, fused, random_model

from tests.support.pretended_cuda import Transfers

SAMPLES = 8
"""Windows of the text of a counted layer."""


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
    "H200": Card(50e12, 45e12, 450e12),
    "A100": Card(17e12, 15e12, 230e12, 6e9),
    "RTX 4090": Card(55e12, 1.2e12, 140e12, 8e9),
}
"""Assumed, not measured: what their kernels are known to reach, pageable copies."""


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


def predict(shapes: Sequence[str], presets: Sequence[str], divide: int) -> list[str]:
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
        "| layer of | preset | up, relative to the layer's bytes | down, relative to what is written | waits | "
        + "host's float64 | "
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
