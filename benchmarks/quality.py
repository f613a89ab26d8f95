"""Quality per kept byte: `python benchmarks/quality.py --model NAME=FOLDER --budget 1/2 1/3 --text NAME=FILE ...`.

One row per model, budget, layout and conversion: what the conversion adds to the NLL of text that nothing was fitted
to (protocol of `headfuse eval`), its time relative to one forward pass of the source through the same calibration
tokens, both measured in this run, and the peak memory of its process. Rows are appended to
`benchmarks/results/quality.jsonl` one at a time, and those that are there are not run again; the page and the plot are
drawn from all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quality_page import CONVERSIONS, KEY, READS, WIDE_GQA, document, key, plot, share_of
from transformers import AutoConfig

import headfuse
from headfuse.checkpoint.plan_file import read_plan
from headfuse.models.heads import head_layout
from headfuse.models.loading import load_tokenizer
from headfuse.text.documents import read_documents
from headfuse.text.windows import token_windows

FORWARD_WINDOWS, LENGTH = 8, 512


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["mha-6m=examples/mha-6m"], help="NAME=FOLDER")
    parser.add_argument("--budget", nargs="+", default=["1/2", "1/4"])
    parser.add_argument("--layout", nargs="+", default=["gqa", "decoupled"])
    parser.add_argument("--conversion", nargs="+", default=list(CONVERSIONS), choices=CONVERSIONS)
    parser.add_argument(
        "--allocator",
        nargs="+",
        default=["sensitivity"],
        help="of layouts decoupled and latent; K+V: so many heads in every layer, decoupled",
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--data", default="default", help="calibration text")
    parser.add_argument("--options", default="", help="more options of headfuse fuse, such as '--random-tokens 1/4'")
    parser.add_argument("--text", nargs="+", default=[], help="NAME=FILE to evaluate on")
    parser.add_argument("--windows", type=int, default=48, help=f"of {LENGTH} tokens, of every text")
    parser.add_argument("--task", nargs="+", default=[], help="NAME=FILE of multiple-choice questions, jsonl")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/quality.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/quality.md"), help="the plot goes beside it")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    known = {key(row) for row in done}
    for row, folder in () if options.draw else wanted(options):
        if key(row) in known:
            continue
        measured = source(row, folder, options) if row["conversion"] == "source" else convert(row, folder, options)
        done.append({**row, **measured})
        with options.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(done[-1]) + "\n")
        print(done[-1], flush=True)
    options.page.write_text(document(done), encoding="utf-8")
    plot(done, options.page.with_suffix(".png"))


def wanted(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of the command line with their model folders; every model's source comes first."""
    calibration = Path(options.data).name
    for model in options.model:
        name, folder = model.split("=", 1)
        blank = dict.fromkeys(KEY, "")
        yield {**blank, "model": name, "conversion": "source"}, folder
        for budget, seed, layout, conversion in itertools.product(
            options.budget,
            options.seed,
            [layout.replace("gqa-wide", WIDE_GQA).replace("latent+", READS) for layout in options.layout],
            options.conversion,
        ):
            row = {"model": name, "budget": budget, "layout": layout, "conversion": conversion}
            for allocator in allocators(layout, conversion, options.allocator):
                extra = {"allocator": allocator, "samples": options.samples, "seed": seed, "options": options.options}
                yield {**row, **extra, "calibration": calibration}, folder


def allocators(layout: str, conversion: str, wanted: list[str]) -> list[str]:
    """Those that a layout and a conversion leave open: of layouts with a choice; `dha`, in `decoupled`, its own."""
    if conversion == "dha":
        return ["dha-greedy"] if layout == "decoupled" else []
    return wanted if layout.startswith(("decoupled", "latent")) else [""]


def source(row: dict[str, Any], folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of the model before any conversion."""
    return figures(folder, options)


def convert(row: dict[str, Any], folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Convert in a process of its own, evaluate, forget."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "fused"
        line = [str(Path(sys.executable).with_name("headfuse")), "fuse", folder, "-o", str(output), "--json"]
        line += ["--data", options.data, *layout_options(row["layout"]), "--samples", str(row["samples"])]
        line += ["--seed", str(row["seed"]), *CONVERSIONS[row["conversion"]], *shlex.split(row["options"])]
        if "+" in row["allocator"]:
            uniform = Path(name) / "uniform.yaml"
            uniform.write_text(uniform_budget(folder, row["budget"], row["allocator"]), encoding="utf-8")
            line += ["--config", str(uniform)]
        else:
            line += ["--budget", row["budget"], *(["--allocator", row["allocator"]] if row["allocator"] else [])]
        forward = forward_seconds(folder, options.data, row["samples"])
        start = time.perf_counter()
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"failed: {' '.join(line)}")
        plan = json.loads((output / "plan.json").read_text())
        counts = [[len(layer[side]) for layer in plan["layers"]] for side in ("key_groups", "value_groups")]
        kept = {"key_heads": counts[0], "value_heads": counts[1]}
        if row["layout"].startswith("latent") or row["layout"] == WIDE_GQA:
            read = read_plan(output)
            kept = {"key_channels": read.key_channels, "value_channels": read.value_channels}
        return {
            **figures(str(output), options),
            **kept,
            "seconds": round(seconds, 1),
            "forward_seconds": round(forward, 1),
            "peak_mb": usage.ru_maxrss // 1024,
        }


def layout_options(name: str) -> list[str]:
    """The options of `headfuse fuse` for a layout as the tables call it."""
    if name == WIDE_GQA:
        return ["--layout", "gqa", "--head-dim", "auto"]
    layout, _, reads = name.partition(READS.removeprefix("latent"))
    return ["--layout", layout, *(["--cross-layer", reads] if reads else [])]


def uniform_budget(folder: str, budget: str, counts: str) -> str:
    """The YAML of `K+V`: K key heads and V value heads in every layer.

    Raises:
        SystemExit: when they take other bytes than the budget.
    """
    layout = head_layout(AutoConfig.from_pretrained(folder))
    layers, heads = layout.num_hidden_layers, layout.num_key_value_heads
    keys, values = map(int, counts.split("+"))
    if keys + values != round(2 * heads * share_of(budget)):
        raise SystemExit(f"{counts} heads in every layer are not {budget} of {heads} + {heads}")
    return json.dumps({"budget": {"total": None, "key_heads": [keys] * layers, "value_heads": [values] * layers}})


def figures(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """NLL on every text, accuracy on every task, KV bytes per token."""
    result: dict[str, Any] = {"nll": {}, "accuracy": {}, "questions": options.questions}
    for entry in options.text:
        name, path = entry.split("=", 1)
        figure = headfuse.evaluate(model, data=path, samples=options.windows, sequence_length=LENGTH).model
        result["nll"][name], result["kv_bytes_per_token"] = round(figure.nll, 4), figure.kv_bytes_per_token
    for entry in options.task:
        name, path = entry.split("=", 1)
        result["accuracy"][name] = accuracy(model, path, options.questions)
    return result


def forward_seconds(model: str, data: str, samples: int) -> float:
    """Seconds of one forward pass over `samples` calibration windows, logits included; measured on a few of them."""
    loaded, tokenizer = headfuse.load(model), load_tokenizer(model)
    windows = token_windows(
        read_documents(data, seed=0, tokenizer=tokenizer), tokenizer, LENGTH, min(samples, FORWARD_WINDOWS)
    )
    with torch.no_grad():
        loaded(windows[:1])  # the first call also allocates
        start = time.perf_counter()
        for window in windows:
            loaded(window[None])
    return (time.perf_counter() - start) * samples / len(windows)


def accuracy(model: str, path: str, questions: int) -> float:
    """Share of questions whose right answer has the highest log-likelihood (`acc` of lm-evaluation-harness)."""
    loaded, tokenizer = headfuse.load(model), load_tokenizer(model)
    right = 0
    lines = Path(path).read_text(encoding="utf-8").splitlines()[:questions]
    for item in map(json.loads, lines):
        prompt = f"Question: {item.get('question') or item['goal']}\nAnswer:"
        start = tokenizer(prompt, add_special_tokens=False).input_ids
        answers = [tokenizer(f" {choice}", add_special_tokens=False).input_ids for choice in item["choices"]]
        longest = max(map(len, answers))
        # what fills a row up comes after its answer, which no prediction of it sees
        batch = torch.tensor([start + answer + [0] * (longest - len(answer)) for answer in answers])
        with torch.no_grad():
            predictions = loaded(batch).logits[:, len(start) - 1 : -1].log_softmax(-1)
        scores = [
            row[range(len(answer)), answer].sum().item() for row, answer in zip(predictions, answers, strict=True)
        ]
        right += scores.index(max(scores)) == item["answer"]
    return round(right / len(lines), 4)


if __name__ == "__main__":
    main()
