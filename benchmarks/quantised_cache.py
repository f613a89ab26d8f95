"""Fusing against quantising at equal bytes: `python benchmarks/quantised_cache.py --text NAME=FILE [--model ..]`.

The NLL of a source and of its fused models from simulated KV caches of few bits (`headfuse eval --cache-dtype`), with
the bytes that a token takes in each, scales included. A row is one model, budget, layout and dtype; rows are appended
to `benchmarks/results/quantised_cache.jsonl`, and those that are there are not run again. Fused models are made in
`--work` where they are not there yet. The tables of the page are written from all rows.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

import headfuse
from headfuse.choices import CacheDtype, names
from headfuse.evaluation.perplexity import evaluation_text, predict, token_nll
from headfuse.evaluation.quantised_cache import QuantisedCaches
from headfuse.layouts.folder import kv_bytes_per_token
from headfuse.models.loading import load_tokenizer
from headfuse.text.documents import read_documents

LENGTH = 512
KEY = ("model", "budget", "layout", "dtype", "text")
PAGE = Path("docs/results/quantised-cache.md")
BEGIN = "<!-- Written by `python benchmarks/quantised_cache.py` from benchmarks/results/quantised_cache.jsonl. -->"
END = "<!-- The end of what is written. -->"
SHARES = (0.6, 0.5, 0.33, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06)
"""Of the source's cache in 16 bits: the sizes that are compared."""
BUDGETS = ("1/2", "1/3", "1/4")


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["mha-6m=examples/mha-6m"], help="NAME=FOLDER")
    parser.add_argument("--budget", nargs="+", default=["1/2", "1/4"], choices=BUDGETS)
    parser.add_argument("--layout", nargs="+", default=["latent", "decoupled"])
    parser.add_argument("--dtype", nargs="+", default=["16", *names(CacheDtype)], help="16: not quantised")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--data", default="default", help="calibration text")
    parser.add_argument("--text", nargs="+", default=[], help="NAME=FILE to evaluate on")
    parser.add_argument("--windows", type=int, default=24, help=f"of {LENGTH} tokens, of every text")
    parser.add_argument("--work", type=Path, default=Path("quantised-cache-models"), help="folder of the fused models")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/quantised_cache.jsonl"))
    parser.add_argument("--draw", action="store_true", help="run nothing")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for row, folder in () if options.draw else wanted(options):
        if tuple(row[name] for name in KEY) in {tuple(known[name] for name in KEY) for known in done}:
            continue
        done.append({**row, **measured(row, made(row, folder, options), options)})
        with options.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(done[-1]) + "\n")
        print(done[-1], flush=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{tables(done)}\n{END}{after}", encoding="utf-8")


def wanted(options: argparse.Namespace) -> Iterator[tuple[dict[str, str], str]]:
    """The rows of the command line with their sources, every model's source first."""
    for entry in options.model:
        name, folder = entry.split("=", 1)
        kept = [("", "source"), *((budget, layout) for budget in options.budget for layout in options.layout)]
        for budget, layout in kept:
            for dtype in options.dtype:
                for text in options.text:
                    row = {"model": name, "budget": budget, "layout": layout, "dtype": dtype}
                    yield {**row, "text": text.split("=", 1)[0]}, folder


def made(row: dict[str, str], folder: str, options: argparse.Namespace) -> str:
    """The folder of the model of a row, fused if it is not there."""
    if row["layout"] == "source":
        return folder
    output = options.work / f"{row['model']}-{row['layout']}-{row['budget'].replace('/', '-')}"
    if not output.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        line = [str(Path(sys.executable).with_name("headfuse")), "fuse", folder, "-o", str(output), "--quiet"]
        line += ["--budget", row["budget"], "--layout", row["layout"], "--preset", "fast"]
        line += ["--samples", str(options.samples), "--seed", "0", "--data", options.data]
        subprocess.run(line, check=True)
    return str(output)


def measured(row: dict[str, str], folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """The mean NLL of each window, and the bytes of a token."""
    model, tokenizer = headfuse.load(folder), load_tokenizer(folder)
    path = dict(text.split("=", 1) for text in options.text)[row["text"]]
    text = evaluation_text(read_documents(path), tokenizer, LENGTH, options.windows, LENGTH, path)
    dtype = next((name for name in names(CacheDtype) if name == row["dtype"]), None)
    caches = None if dtype is None else QuantisedCaches(model, cast(CacheDtype, dtype))
    nll = token_nll(predict(model, text.windows), text.windows).mean(dim=1)
    stored = None if caches is None else caches.bytes_per_token()
    total = kv_bytes_per_token(model.config, 2) if stored is None else stored.numbers + stored.scales
    return {"bytes": total, "scale_bytes": stored.scales if stored else 0, "nll": [round(x, 5) for x in nll.tolist()]}


def gap(row: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """NLL added to that of the source, and the standard error over windows of the paired differences."""
    differences = torch.tensor(row["nll"], dtype=torch.float64) - torch.tensor(base["nll"], dtype=torch.float64)
    return differences.mean().item(), differences.std().item() / math.sqrt(len(differences))


def tables(rows: list[dict[str, Any]]) -> str:
    """Of each model and text: every cache by its size, and the best one of each size and kind."""
    lines = []
    for model, text in dict.fromkeys((row["model"], row["text"]) for row in rows):
        own = [row for row in rows if (row["model"], row["text"]) == (model, text)]
        base = next(row for row in own if row["layout"] == "source" and row["dtype"] == "16")
        mean = sum(base["nll"]) / len(base["nll"])
        lines += ["", f"## {model}, {text}"]
        size = f"{base['bytes']:,} bytes of a token in 16 bits"
        lines += [f"{len(base['nll'])} windows of {LENGTH} tokens. The source: {size}, NLL {mean:.3f}."]
        lines += ["The smallest gap of what takes at most so many bytes:"]
        lines += ["", "| share | bytes of a token | quantised alone | fused alone | both |", "|---|---|---|---|---|"]
        lines += [limit(int(share * base["bytes"]), own, base) for share in SHARES]
        lines += ["", "Every measurement:", "", "| bytes of a token | of them scales | model | numbers | NLL gap |"]
        lines += ["|---|---|---|---|---|"]
        for row in sorted(own, key=lambda row: -row["bytes"]):
            value, error = gap(row, base)
            cells = [f"{row['bytes']:,}", f"{row['scale_bytes']:,}", called(row), row["dtype"]]
            lines.append(f"| {' | '.join(cells)} | {value:.4f} ± {error:.4f} |")
    return "\n".join(lines) + "\n"


def limit(size: int, rows: list[dict[str, Any]], base: dict[str, Any]) -> str:
    """A line: the best of each kind within a size."""
    kinds = {
        "quantised": [row for row in rows if row["layout"] == "source" and row["dtype"] != "16"],
        "fused": [row for row in rows if row["layout"] != "source" and row["dtype"] == "16"],
        "both": [row for row in rows if row["layout"] != "source" and row["dtype"] != "16"],
    }
    found = {}
    for kind, members in kinds.items():
        within = [(*gap(row, base), row) for row in members if row["bytes"] <= size]
        found[kind] = min(within, key=lambda entry: entry[0], default=None)
    best = min((entry[0] for entry in found.values() if entry), default=math.nan)
    cells = [f"{size / base['bytes']:.2f}", f"{size:,}"]
    for entry in found.values():
        if entry is None:
            cells.append("")
            continue
        value, error, row = entry
        shown = f"{value:.4f} ± {error:.4f}"
        what = " ".join(part for part in (called(row) if row["layout"] != "source" else "", row["dtype"]) if part)
        cells.append(f"{f'**{shown}**' if value == best else shown} ({what.removesuffix(' 16')})")
    return "| " + " | ".join(cells) + " |"


def called(row: dict[str, Any]) -> str:
    """The model of a row."""
    return "source" if row["layout"] == "source" else f"{row['layout']} {row['budget']}"


if __name__ == "__main__":
    main()
