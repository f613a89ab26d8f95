"""Sharing a cache between layers, before and after training: `python benchmarks/across_layers.py --train TEXT
--text NAME=FILE [NAME=FILE ...] [--model FOLDER] [--budget 1/2 1/4 1/8] [--tokens 250k]`.

Starts at equal cache bytes, all of layout latent, preset `fast`:

- within: every layer reads its own cache;
- reads N: every layer reads the caches of N layers before it, too (`--cross-layer N`);
- pairs, fitted: two neighbouring layers share one cache, as wide as both of theirs in `within`; read maps and output
  projections are fitted;
- pairs: the same, but the second layer keeps its own queries and outputs and takes keys and values of the first as they
  are, as MLKV (2406.09297) and CLA (2405.12981) train it.

Each is evaluated, trained with `headfuse.uptrain` (recipe of the command's defaults, the source as teacher) and
evaluated again. A row is appended to `benchmarks/results/across_layers.jsonl` when it is complete, and not run again
when it is there. The table is printed in the end.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import headfuse
from headfuse.choices import Side
from headfuse.conversion.preflight import Prepared, prepare
from headfuse.evaluation.evaluate import evaluate
from headfuse.evaluation.result import ModelFigures
from headfuse.fusion.reading_layer import conditional_slots
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan
from headfuse.planning.planner import SURVEYED
from headfuse.planning.widths import width_quantum
from headfuse.text.calibration import START_WEIGHT

LENGTH = 512
STARTS = ("within", "reads 1", "reads 5", "pairs", "pairs, fitted")
KEY = ("model", "budget", "start", "seed", "tokens")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="examples/mha-6m")
    parser.add_argument("--train", help="text to calibrate and to train on")
    parser.add_argument("--text", nargs="+", default=[], help="NAME=FILE to evaluate on")
    parser.add_argument("--windows", type=int, default=24, help=f"of {LENGTH} tokens, of every text")
    parser.add_argument("--budget", nargs="+", default=["1/2", "1/4", "1/8"])
    parser.add_argument("--start", nargs="+", default=list(STARTS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=250_000, help="of training; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/across_layers.jsonl"))
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    known = {tuple(row[name] for name in KEY) for row in rows}
    for budget in options.budget:
        for start in options.start if options.train else ():
            key = (Path(options.model).name, budget, start, options.seed, options.tokens)
            if key not in known:
                rows.append({**dict(zip(KEY, key, strict=True)), **measure(options, budget, start)})
                print(json.dumps(rows[-1]), flush=True)
                with options.results.open("a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
    show(rows)


def measure(options: argparse.Namespace, budget: str, start: str) -> dict[str, Any]:
    """Convert, evaluate, train, evaluate: bytes of a token, and the NLL added to each text before and after."""
    folder = Path(tempfile.mkdtemp())
    try:
        fused = convert(options, budget, start, folder)
        before, kv_bytes = gaps(options, fused)
        found: dict[str, Any] = {"kv_bytes_per_token": kv_bytes, "before": before}
        if options.tokens:
            headfuse.uptrain(
                str(fused), data=options.train, tokens=options.tokens, teacher=options.model, seed=options.seed,
                sequence_length=LENGTH, output=folder / "trained",
            )  # fmt: skip
            found["after"] = gaps(options, folder / "trained")[0]
        return found
    finally:
        shutil.rmtree(folder)


def convert(options: argparse.Namespace, budget: str, start: str, folder: Path) -> Path:
    """The folder of a start."""
    settings: dict[str, Any] = {
        "layout": "latent", "preset": "fast", "data": options.train, "samples": options.samples, "seed": options.seed,
    }  # fmt: skip
    share: dict[str, Any] = {"total": budget}
    if start.startswith("reads"):
        share["cross_layer"] = int(start.split()[1])
    if not start.startswith("pairs"):
        return headfuse.fuse(options.model, output=folder / "fused", budget=share, **settings).output
    within = headfuse.analyze(options.model, budget=share, **settings).plan
    plan = folder / "plan.json"
    prepared = prepare(options.model, output=folder / "fused", budget=share, **settings)
    plan.write_text(in_pairs(prepared, within).to_json())
    paired = headfuse.fuse(options.model, output=folder / "fused", plan=plan, **settings).output
    if start == "pairs":
        as_published(paired, Path(options.model), within.heads.num_hidden_layers)
    return paired


def in_pairs(prepared: Prepared, plan: FusionPlan) -> FusionPlan:
    """The plan in which every second layer caches nothing and reads the one before it, as wide as both would be."""
    streamed = StreamedModel(prepared.source.checkpoint, prepared.source.config, prepared.device)
    text, layers = prepared.text.part(SURVEYED), list(plan.layers)
    keys, values = pair_widths(plan, "key"), pair_widths(plan, "value")
    whole = (tuple(range(plan.heads.num_key_value_heads)),)
    with torch.no_grad():
        for source in streamed.walk([streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)]):
            first = source.index - source.index % 2
            if source.index == first:
                key, value = keys[first // 2], values[first // 2]
                found: dict[str, Any] = {
                    "key_widths": (key,), "value_widths": (value,),
                    "rotary_slots": (conditional_slots(source.captures, plan.heads, None, key),),
                }  # fmt: skip
            else:
                found = {"key_widths": (0,), "value_widths": (0,), "rotary_slots": ((),)}
                found |= {"key_sources": (first,), "value_sources": (first,)}
            groups = {"key_groups": whole, "value_groups": whole}
            layers[source.index] = layers[source.index].model_copy(update={**groups, **found})
    return plan.model_copy(update={"layers": tuple(layers)})


def pair_widths(plan: FusionPlan, side: Side) -> list[int]:
    """Channels of each pair of layers: of both in the plan, and what is more than a layer has goes to other pairs."""
    heads, quantum = plan.heads, width_quantum(plan.heads)
    full = heads.num_key_value_heads * heads.head_dim
    channels = [layer.channels(side, heads.head_dim) for layer in plan.layers]
    wanted = [sum(channels[first : first + 2]) for first in range(0, len(channels), 2)]
    widths = [min(full, width) for width in wanted]
    while sum(widths) < min(sum(wanted), full * len(widths)):
        narrow = min(range(len(widths)), key=widths.__getitem__)
        widths[narrow] += min(quantum, full - widths[narrow])
    return widths


def as_published(folder: Path, model: Path, num_layers: int) -> None:
    """Give the second layer of each pair the source's queries and outputs, and the read maps of the first."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    source = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for layer in range(1, num_layers, 2):
        for name in [name for name in tensors if re.search(rf"layers\.{layer}\.", name)]:
            if name.endswith(("key_read", "key_read_plain", "value_read")):
                tensors[name] = tensors[name.replace(f"layers.{layer}.", f"layers.{layer - 1}.")].clone()
            elif name.endswith(("q_proj.weight", "q_proj.bias", "o_proj.weight", "o_proj.bias")):
                tensors[name] = source[name].to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def gaps(options: argparse.Namespace, folder: Path) -> tuple[dict[str, float], int]:
    """The NLL that a model adds to the source's, by text, and the cache bytes of a token."""
    gap, kv_bytes = dict[str, float](), 0
    for name, text in (item.split("=", 1) for item in options.text):
        model, source = (figures(each, text, options.windows) for each in (str(folder), options.model))
        gap[name] = round(model.nll - source.nll, 4)
        kv_bytes = model.kv_bytes_per_token
    return gap, kv_bytes


@functools.cache
def figures(folder: str, text: str, windows: int) -> ModelFigures:
    """What `headfuse eval` says of a folder; a source is evaluated once."""
    return evaluate(
        folder, data=text, samples=windows, sequence_length=LENGTH, dtype="float32", trust_remote_code=True
    ).model


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table of Markdown."""
    print("| model | kept | start | bytes of a token | before | after | tokens |\n|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["model"], row["budget"], STARTS.index(row["start"]))):
        before, after = (" / ".join(f"{gap:.3f}" for gap in row.get(when, {}).values()) for when in ("before", "after"))
        cells = [row["model"], row["budget"], row["start"], f"{row['kv_bytes_per_token']:,}", before, after]
        print("| " + " | ".join([*cells, f"{row['tokens']:,}"]) + " |")


if __name__ == "__main__":
    main()
