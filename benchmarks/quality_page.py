"""The page and the plot of quality.py: what a row of benchmarks/results/quality.jsonl is, and one table per model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONVERSIONS = {
    "first": ("--method", "first", "--preset", "fast"),
    "mean": ("--method", "mean", "--preset", "fast"),
    "align": ("--method", "align", "--preset", "fast"),
    "dha": ("--config", "dha-small"),
    "fast": ("--preset", "fast"),
    "balanced": ("--preset", "balanced"),
    "best": ("--preset", "best"),
}
"""Column name -> options of `headfuse fuse`; the presets are of the default method, `dha` is in layout `decoupled`."""
WIDE_GQA = "gqa, wide"
"""What `--layout gqa-wide` is called in the tables: layout gqa with `--head-dim auto`."""
READS = "latent, reads "
"""What `--layout latent+N` is called, before the N: layout latent with `--cross-layer N`."""
KEY = ("model", "budget", "layout", "conversion", "allocator", "samples", "seed", "calibration", "options")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    return tuple(row.get(name, "") for name in KEY)


def share_of(budget: str) -> float:
    """A budget as a number."""
    top, _, bottom = budget.partition("/")
    return float(top) / float(bottom or 1)


def document(rows: list[dict[str, Any]]) -> str:
    """The page with one table per model."""
    lines = [
        "# Results",
        "Written by `python benchmarks/quality.py` from benchmarks/results/quality.jsonl, one row per measurement. The",
        "columns are its options. Gap: NLL per token of the fused model minus that of its source, on text that nothing",
        "was fitted to, before any uptraining. Time: of the whole command, relative to one forward pass of the source",
        "through the same calibration tokens in the same run.",
        "`first`, `mean`, `align` and `dha` (configs/dha-small.yaml) are the published reductions; `fast`, `balanced`,",
        "`best` the presets of headfuse.",
        "Allocator `K+V`: so many key and value heads in every layer. Several seeds (of the calibration sample): the",
        "mean and, in brackets, the smallest and the largest. `latent, reads N`: layout latent with `--cross-layer N`.",
        "Rows without a time were converted beside other jobs, or on a GPU with the same options and `--device cuda`;",
        "those that were run on both gave the same NLL to four digits.",
        "What little training adds to each is in [recovery.md](recovery.md), with a plot; other converters are in",
        "[peers.md](peers.md).",
        "",
        "![NLL gap against the share of the cache kept](quality.png)",
    ]
    sources = {row["model"]: row for row in rows if row["conversion"] == "source"}
    for model, base in sources.items():
        texts, tasks = list(base["nll"]), list(base["accuracy"])
        facts = [f"NLL {base['nll'][t]:.3f} on {t}" for t in texts]
        facts += [
            f"accuracy {base['accuracy'][t]:.1%} on the first {base['questions']} questions of {t}" for t in tasks
        ]
        lines += ["", f"## {model}", f"Source: {', '.join(facts)}."]
        head = ["budget", "layout", "conversion", "allocator", "samples", "seed"]
        head += [f"gap {t}" for t in texts] + tasks + ["time", "peak MB"]
        samples: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if row["model"] == model and row["conversion"] != "source":
                samples.setdefault(key({**row, "seed": ""}), []).append(row)
        order, calibration = list(CONVERSIONS), None
        for group in sorted(
            samples.values(),
            key=lambda g: (
                g[0]["calibration"],
                -share_of(g[0]["budget"]), g[0]["layout"], order.index(g[0]["conversion"]), g[0]["samples"],
            ),
        ):  # fmt: skip
            if group[0]["calibration"] != calibration:
                calibration = group[0]["calibration"]
                lines += ["", f"Calibration on {calibration}:", ""]
                lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            row, seeds = group[0], " ".join(str(r["seed"]) for r in group)
            conversion = f"{row['conversion']} {row.get('options', '')}".strip()
            cells = [row["budget"], row["layout"], conversion, row["allocator"], row["samples"], seeds]
            cells += [_spread([r["nll"][t] - base["nll"][t] for r in group if t in r["nll"]], "{:.3f}") for t in texts]
            cells += [_spread([r["accuracy"][t] for r in group if t in r["accuracy"]], "{:.1%}") for t in tasks]
            priced = [r for r in group if "seconds" in r]
            cells += [_spread([r["seconds"] / r["forward_seconds"] for r in priced], "{:.1f}x")]
            cells += [max((r["peak_mb"] for r in priced), default="")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """NLL gap on each model's first text against the share of the cache kept; plans of equal counts are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sources = {row["model"]: row for row in rows if row["conversion"] == "source"}
    figure, axes = pyplot.subplots(1, max(1, len(sources)), figsize=(7 * max(1, len(sources)), 4.5), squeeze=False)
    for axis, (model, base) in zip(axes[0], sources.items(), strict=False):
        text = next(iter(base["nll"]), None)
        lines: dict[str, dict[float, float]] = {}
        for row in rows:
            fused = row["model"] == model and row["conversion"] != "source" and "+" not in row["allocator"]
            if fused and text in row["nll"]:
                points = lines.setdefault(f"{row['conversion']}, {row['layout']}", {})
                gap, share = row["nll"][text] - base["nll"][text], share_of(row["budget"])
                points[share] = min(gap, points.get(share, gap))
        for name, points in sorted(lines.items()):
            layout = name.split(", ", 1)[1]
            style = {"decoupled": "-o", "latent": "-^"}.get(layout, "-v" if layout.startswith(READS) else "--s")
            axis.plot(sorted(points), [points[share] for share in sorted(points)], style, label=name)
        axis.set(xlabel="KV cache kept", ylabel="NLL gap, nats per token", title=f"{model}, {text}", yscale="log")
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _spread(values: list[float], form: str) -> str:
    """Their mean, and from where to where they go."""
    if not values:
        return ""
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"
