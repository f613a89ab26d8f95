"""Draws the two pictures of the README: `python scripts/draw_readme.py [quality] [terminal]`.

`docs/images/quality.svg` shows benchmarks/results/quality.jsonl. `docs/images/terminal.svg` is a recording of the
command below, run on the bundled model.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/quality.jsonl"
FOLDER = ROOT / "docs/images"
TEXT = "wikitext2"
RECORDED = "headfuse fuse examples/mha-6m --budget 1/4 --preset fast --output fused"
WIDTH = 88
"""Columns of the recording."""
MODELS = {"mha-6m": "bundled model, 6 M, 8 KV heads", "smollm2-135m": "SmolLM2-135M-Instruct, 3 KV heads"}
SERIES = {
    ("gqa", "mean"): ("mean-pooled GQA", "#8c8c8c", "s"),
    ("decoupled", "dha"): ("DHA", "#b5651d", "^"),
    ("gqa", "balanced"): ("headfuse, gqa", "#7fb2e5", "o"),
    ("decoupled", "balanced"): ("headfuse, decoupled", "#1f5fa8", "D"),
    ("latent", "balanced"): ("headfuse, latent", "#0a2f5c", "v"),
}
"""Layout and conversion -> label, colour and marker."""


def points(model: str) -> Iterator[tuple[tuple[str, str], list[tuple[float, float]]]]:
    """Of each series, the share of the cache and the mean gap over samples of the most windows; of allocated plans."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    own = [row for row in rows if row["model"] == model]
    (source,) = (row["nll"][TEXT] for row in own if row["conversion"] == "source")
    gaps: dict[tuple[str, str], dict[float, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for row in own:
        if "+" not in row["allocator"] and TEXT in row["nll"] and row["conversion"] != "source":
            share = float(Fraction(row["budget"]))
            by_windows = gaps[row["layout"], row["conversion"]][share]
            by_windows.setdefault(row["samples"], []).append(row["nll"][TEXT] - source)
    for series in SERIES:
        yield series, sorted((share, statistics.mean(each[max(each)])) for share, each in gaps[series].items())


def quality(path: Path) -> None:
    """Draw the gap to the source against the share of the cache that is kept."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained", facecolor="white")
    for axis, (model, title) in zip(figure.subplots(1, 2, sharey=True), MODELS.items(), strict=True):
        for series, drawn in points(model):
            label, colour, marker = SERIES[series]
            if drawn:
                axis.plot(*zip(*drawn, strict=True), marker=marker, color=colour, label=label)
        shares = {"mha-6m": ("1/8", "1/4", "1/2"), "smollm2-135m": ("1/4", "1/3", "1/2")}[model]
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks([float(Fraction(share)) for share in shares], shares)
        axis.set_xticks([], minor=True)
        axis.set(title=title, xlabel="share of the KV cache kept")
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    marks = (0.03, 0.1, 0.3, 1, 3)
    figure.axes[0].set_yticks(marks, list(map(str, marks)))
    figure.axes[0].set_yticks([], minor=True)
    figure.axes[0].set_ylabel("added NLL per token, WikiText-2")
    shown = figure.axes[0].get_legend_handles_labels()
    figure.axes[1].legend(*shown, frameon=False, fontsize=9, loc="upper right")
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "headfuse"}):
        figure.savefig(path, metadata={"Date": None})


def terminal(path: Path) -> None:
    """Run the command, and keep what a terminal shows."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        shown = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", *shlex.split(RECORDED)]
        done = subprocess.run(command, cwd=folder, env=shown, stdout=subprocess.PIPE, text=True, check=True)
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text(f"$ {RECORDED}", style="bold"))
    console.print(Text.from_ansi(done.stdout.rstrip()))
    path.write_text(console.export_svg(title="headfuse", unique_id="headfuse"), encoding="utf-8")


def main() -> None:
    """Draw the pictures that are named, or both."""
    drawn = {"quality": quality, "terminal": terminal}
    for name in sys.argv[1:] or drawn:
        drawn[name](FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
