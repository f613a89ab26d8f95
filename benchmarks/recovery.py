"""The race to recover a model: `python benchmarks/recovery.py --train TEXT --validation TEXT [--seed 0 1]`.

Start points at the same share of the cache, each uptrained by `headfuse.uptrain` with one recipe and one order of the
text; the loss on text of its own against the tokens that were spent, those of search, fusion, calibration and
refinement included. One row per budget, start and seed, appended to
`benchmarks/results/recovery.jsonl` when it is complete, and not run again when it is there; the page and the plot are
drawn from all rows.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from overview import relative_accuracy
from recovery_peer import CALIBRATION_TOKENS, low_rank
from tasks import against_source

import headfuse
from headfuse.config.fuse import CalibrationConfig, FuseConfig, load_config
from headfuse.config.presets import PRESETS
from headfuse.evaluation.evaluate import evaluate
from headfuse.evaluation.tasks import STANDARD
from headfuse.models.source import Source
from headfuse.plan import HeadBudget

LENGTH, BATCH, SAMPLES, WINDOWS = 256, 4, 64, 32
DHA = load_config("dha-small", {}).model_dump()["dha"]
"""Scaled to the bundled model and to few tokens: see docs/results/recovery.md."""
GQA = {"layout": "gqa", "preset": "fast", "grouping": "neighbours"}
STARTS: dict[str, dict[str, Any]] = {
    "gqa": {"method": "mean", **GQA},
    "align": {"method": "align", "layout": "gqa", "preset": "fast"},
    "dha": {"method": "dha", "dha": DHA},
    "dha, no fusion": {"method": "dha", "dha": {**DHA, "fusion_steps": 0}},
    "dha, uniform": {"method": "dha", "allocator": "uniform", "dha": DHA},
    "dha, KL": {"method": "dha", "dha": {**DHA, "loss": "kl"}},
    "dha, from subspace": {"method": "dha", "dha": {**DHA, "start": "subspace"}},
    "fast": {"layout": "decoupled", "preset": "fast"},
    "balanced": {"layout": "decoupled", "preset": "balanced"},
    "latent, fast": {"layout": "latent", "preset": "fast"},
    "latent, balanced": {"layout": "latent", "preset": "balanced"},
    "care": {},
}
"""Name -> options of `headfuse fuse`: mean-pooled GQA, its ablations, and the presets of the default method; `care` is
what benchmarks/peers.py saved.
"""
KEY = ("model", "budget", "start", "seed", "tokens", "recipe")
MODEL = "mha-6m"
"""That of rows which name none."""
RECIPE = "averaged weights"
"""What sets the recipe of today's `uptrain` apart from that of rows which name none. They are shown apart."""


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=f"{MODEL}=examples/mha-6m", help="NAME=FOLDER")
    parser.add_argument("--train", help="text to calibrate and to train on")
    parser.add_argument("--validation", help="text of the figures alone")
    parser.add_argument("--budget", nargs="+", default=["1/4", "1/2"])
    parser.add_argument("--start", nargs="+", default=[start for start in STARTS if start != "care"], choices=STARTS)
    parser.add_argument(
        "--care", type=Path, help="start care: `peers.py care --save` of the same share, and a tokenizer"
    )
    parser.add_argument("--tokens", type=int, default=40_960, help="of uptraining")
    parser.add_argument("--every", type=int, default=20, help="steps between two evaluations")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--compute-dtype", help="as of headfuse uptrain")
    parser.add_argument("--tasks-path", help="run the standard tasks before and after: what scripts/get_tasks.py wrote")
    parser.add_argument("--limit", type=int, default=50, help="questions of every task")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/recovery.jsonl"))
    parser.add_argument(
        "--page", type=Path, default=Path("docs/results/recovery.md"), help="written anew below its line of dashes"
    )
    parser.add_argument("--draw", action="store_true", help="run nothing")
    options = parser.parse_args()
    if "care" in options.start and options.care is None and not options.draw:
        parser.error("start care needs --care")
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    known = {tuple(row.get(name, MODEL if name == "model" else "") for name in KEY) for row in rows}
    name, folder = options.model.split("=", 1)
    recipe = RECIPE + (f", products in {options.compute_dtype}" if options.compute_dtype else "")
    for seed, budget, start in () if options.draw else itertools.product(options.seed, options.budget, options.start):
        values = (name, budget, start, seed, options.tokens, recipe)
        if values not in known:
            rows.append(dict(zip(KEY, values, strict=True)) | race(options, folder, budget, start, seed))
            print(json.dumps(rows[-1]), flush=True)
            with options.results.open("a") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
    write(rows, options.page)


def race(options: argparse.Namespace, model: str, budget: str, start: str, seed: int) -> dict[str, Any]:
    """Convert, uptrain, and read the log: one row."""
    folder = Path(tempfile.mkdtemp())
    try:
        training: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        budgets, fused = HeadBudget(key_heads=(), value_heads=()), options.care
        if start == "care":
            training = low_rank(rank(model, budget))
        else:
            fused = folder / "fused"
            budgets = headfuse.fuse(model, fusing(options, budget, start, seed), output=fused).plan.head_budget
        with training:
            headfuse.uptrain(
                str(fused), data=options.train, tokens=options.tokens, loss="kl", teacher=model,
                batch_size=BATCH, sequence_length=LENGTH, seed=seed, validation_data=options.validation,
                validation_windows=WINDOWS, compute_dtype=options.compute_dtype,
                checkpoint_every=options.every, output=folder / "uptrained",
            )  # fmt: skip
        log = [json.loads(line) for line in (folder / "uptrained/train_log.jsonl").read_text().splitlines()]
        fusion = fused / "train_log.jsonl"
        stages = [json.loads(line) for line in fusion.read_text().splitlines()] if fusion.exists() else []
        source = evaluate(model, data=options.validation, samples=WINDOWS, sequence_length=LENGTH)
        ends = {"fused": fused, "uptrained": folder / "uptrained"} if options.tasks_path else {}
        accuracy = {end: tasks(path, model, options) for end, path in ends.items()}
    finally:
        shutil.rmtree(folder)
    step = BATCH * LENGTH
    points = [[0, next(e["nll_before"] for e in log if e["event"] == "start")]]
    points += [[e["step"] * step, e["nll"]] for e in log if e["event"] == "validation"]
    row = {
        "spent": spent(start, stages),
        "source": source.model.nll, "points": points,
        "key_heads": budgets.key_heads, "value_heads": budgets.value_heads,
    }  # fmt: skip
    if stages:
        row["fusion_loss"] = [s["fusion"] for s in stages if s["phase"] != "collapsed"]
    return row | ({"tasks": accuracy} if accuracy else {})


def fusing(options: argparse.Namespace, budget: str, start: str, seed: int) -> FuseConfig:
    """The options of a start's conversion."""
    settings = dict(STARTS[start])
    share: dict[str, Any] = {"total": budget}
    if "allocator" in settings:
        share["allocator"] = settings.pop("allocator")
    calibration = {"data": options.train, "samples": SAMPLES, "sequence_length": LENGTH}
    return FuseConfig.model_validate({"budget": share, "calibration": calibration, "seed": seed, **settings})


def rank(model: str, budget: str) -> int:
    """That of CARE's keys, and of its values, at a share of the cache."""
    heads = Source.open(model).heads
    return int(heads.num_key_value_heads * heads.head_dim * Fraction(budget))


def tasks(folder: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Mean accuracy of the standard tasks, of a folder and of its source, and their paired difference."""
    asked = STANDARD, options.tasks_path, options.limit, options.compute_dtype
    mean = against_source(str(folder), model, *asked)["tasks_mean"]
    return {side: mean[side] for side in ("model", "baseline", "difference")}


def spent(start: str, stages: list[dict[str, Any]]) -> int:
    """Tokens that were read before uptraining began, those of several passes as often as they were read."""
    if stages:
        return int(stages[-1]["tokens"])
    if start == "gqa":
        return 0
    if start == "care":
        return CALIBRATION_TOKENS
    statistics = SAMPLES * LENGTH
    if STARTS[start].get("preset") != "balanced":
        return statistics
    trained = SAMPLES - CalibrationConfig().held_out_windows(SAMPLES)
    return statistics + round(trained * PRESETS["balanced"].model_passes) * LENGTH


# ---------------------------------------------------------------- tables and plot


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """The tables and the plot, below what the file says by hand up to the line of dashes."""
    text = path.read_text().split("\n---\n")[0] if path.exists() else "# Recovery\n"
    written = "Written by `python benchmarks/recovery.py --draw` from benchmarks/results/recovery.jsonl."
    lines = [text, "---", "", written, ""]
    for title, own in by_race(rows).items():
        lines += [f"## {title}", f"Source: NLL {own[0]['source']:.3f}.", ""]
        lines += ["| start | seed | tokens before | NLL before | tokens: NLL (perplexity, source / model) | heads |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in own:
            after = ", ".join(f"{n // 1000}k: {nll:.3f} ({relative(row, nll):.3f})" for n, nll in row["points"][1:])
            heads = " + ".join(" ".join(map(str, row[side])) for side in ("key_heads", "value_heads") if row[side])
            cells = row["start"], row["seed"], f"{row['spent'] // 1000}k", f"{row['points'][0][1]:.3f}", after, heads
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += ["", *needed(own), *task_lines(own), ""]
    lines += ["![NLL against tokens](recovery.png)", ""]
    path.write_text("\n".join(lines))
    draw(rows, path.with_suffix(".png"))


def task_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Accuracy relative to the source's before and after, with the standard error of the paired difference."""
    lines = []
    for row in rows:
        said = [f"{end} {relative_accuracy(mean)}" for end, mean in row.get("tasks", {}).items()]
        if said:
            lines.append(
                f"- Standard tasks, mean accuracy relative to the source's, {row['start']}, {row['tokens']:,} tokens: "
                f"{', '.join(said)}."
            )
    return lines


def by_race(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows that may be compared, by the title of their table: of one budget and one recipe."""
    races = dict[str, list[dict[str, Any]]]()
    for row in rows:
        recipe = f", {row['recipe']}" if "recipe" in row else ""
        model = f", {row['model']}" if row.get("model", MODEL) != MODEL else ""
        races.setdefault(f"{row['budget']} of the cache{model}{recipe}", []).append(row)
    return races


def relative(row: dict[str, Any], nll: float) -> float:
    """Perplexity of the source over that of the model."""
    return float(torch.tensor(row["source"] - nll).exp())


def needed(rows: list[dict[str, Any]]) -> list[str]:
    """How many tokens one start takes to the lowest loss of another: GQA to those of all, the others to DHA's."""
    lines = []
    for runner, goals in (("gqa", list(STARTS)[1:]), *((start, ["dha"]) for start in ("align", "fast", "balanced"))):
        curve = max((row for row in rows if row["start"] == runner), key=lambda row: row["tokens"], default=None)
        for goal in (row for row in rows if row["start"] in goals and curve is not None):
            assert curve is not None
            at, loss = min(goal["points"], key=lambda point: point[1])
            spent = goal["spent"] + at
            total = [(n + curve["spent"], nll) for n, nll in curve["points"]]
            takes = reached(total, loss)
            said = f"{takes / spent:.2f} times" if takes is not None else f"more than {total[-1][0] / spent:.2f} times"
            lines.append(
                f"- {runner} takes {said} the tokens of {goal['start']}, seed {goal['seed']} ({spent // 1000}k), "
                f"to reach its lowest NLL, {loss:.3f}."
            )
    return lines


def reached(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Tokens at which a curve falls to a loss, between its points on a line; None if it does not."""
    if points[0][1] <= loss:
        return points[0][0]
    for (a, high), (b, low) in itertools.pairwise(points):
        if low <= loss:
            return a + (b - a) * (high - loss) / (high - low)
    return None


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """NLL against all tokens spent, one panel per budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    races = by_race(rows)
    figure, axes = pyplot.subplots(
        1, max(1, len(races)), figsize=(5.5 * max(1, len(races)), 4.2), squeeze=False, layout="constrained"
    )
    colours = {start: f"C{index}" for index, start in enumerate(STARTS)}
    for axis, (title, own) in zip(axes[0], races.items(), strict=False):
        seen = set[str]()
        axis.axhline(own[0]["source"], color="black", lw=0.8, ls=":", label="source")
        for row in own:
            tokens, losses = zip(*row["points"], strict=True)
            label = None if row["start"] in seen else row["start"]
            seen.add(row["start"])
            total = [(n + row["spent"]) / 1000 for n in tokens]
            axis.plot(total, losses, "o-", ms=3, lw=1.2, color=colours[row["start"]], label=label)
        axis.set(title=textwrap.fill(title, 45), xlabel="tokens read, thousands", ylabel="NLL, unseen text")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
