"""The table of peers: `python benchmarks/peers_page.py` writes it into docs/results/peers.md.

Reads benchmarks/results/peers.jsonl (peers.py) and the rows of benchmarks/results/quality.jsonl (quality.py) that were
calibrated on the same text. Of a peer's settings at a budget the table has the best, ours over several seeds the mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

PEERS, OURS = Path("benchmarks/results/peers.jsonl"), Path("benchmarks/results/quality.jsonl")
PAGE = Path("docs/results/peers.md")
BEGIN = "<!-- Written by `python benchmarks/peers_page.py`. -->"
END = "<!-- The end of what is written. -->"
CALIBRATION = {"qwen2.5-coder-0.5b": "prose_code_train.jsonl"}
"""Calibration text of a model; of the others `redpajama_train.jsonl`."""
NAMES = {"transmla": "TransMLA", "care": "CARE", "palu": "Palu"}
METHODS = ("first", "mean", "align", "dha", "fast", "balanced", "best")
READS = ("latent, reads 1", "latent, reads 3", "latent, reads 5")
LAYOUTS = ("latent", *READS, "decoupled", "gqa", "gqa, wide", "layerwise")
Row = dict[str, Any]
Key = TypeVar("Key")


def main() -> None:
    """Write the tables between the marks of the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{tables(rows(PEERS), rows(OURS))}\n{END}{after}", encoding="utf-8")


def rows(path: Path) -> list[Row]:
    """The rows of a file of results."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tables(peers: list[Row], ours: list[Row]) -> str:
    """One table for every model that a peer was run on."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in peers):
        theirs = [row for row in peers if row["model"] == model]
        own = [row for row in ours if row["model"] == model]
        base = next(row for row in own + theirs if "source" in (row.get("conversion"), row.get("kept")))
        texts = [*theirs[0]["nll"]]
        lines += ["", f"## {model}", "Source: " + ", ".join(f"NLL {base['nll'][text]:.3f} on {text}" for text in texts)]
        lines += [
            "",
            "| kept | method | NLL added, " + " | NLL added, ".join(texts) + " | settings |",
            "|---|---|" + "---|" * len(texts) + "---|",
        ]
        budgets = {row["kept"] for row in theirs} - {"source", "1"}
        for kept in sorted(budgets, key=lambda kept: -share(kept)):
            found = [*peer_lines(theirs, kept, base, texts), *own_lines(own, kept, base, texts)]
            best = [min((line[1][i] for line in found), default=0.0) for i in range(len(texts))]
            for method, gaps, settings in sorted(found, key=lambda line: line[1][0]):
                cells = [f"**{gap:.3f}**" if gap == best[i] else f"{gap:.3f}" for i, gap in enumerate(gaps)]
                lines.append(f"| {kept} | {method} | {' | '.join(cells)} | {settings} |")
    return "\n".join(lines)


def peer_lines(theirs: list[Row], kept: str, base: Row, texts: list[str]) -> list[tuple[str, list[float], str]]:
    """Method, NLL added and settings of the best row of every peer and method, by the mean of the texts."""

    def name_of(row: Row) -> str:
        method = row["settings"].get("method", "")
        return NAMES[row["peer"]] + (f", {method}" if method else "")

    result = []
    for name, group in grouped((row for row in theirs if row["kept"] == kept), name_of).items():
        row = best_of(group)
        settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items() if key != "method")
        settings += f"; best of {len(group)}" if len(group) > 1 else ""
        result.append((name, gaps([row], base, texts), settings or "its own"))
    return result


def own_lines(own: list[Row], kept: str, base: Row, texts: list[str]) -> list[tuple[str, list[float], str]]:
    """Those of headfuse, the mean of its seeds; plans of equal counts and the smaller of two samples are left out."""
    of_budget = (row for row in own if row["budget"] == kept and set(texts) <= set(row["nll"]))
    usual = (row for row in of_budget if row["calibration"] == text_of(row["model"]) and row["layout"] in LAYOUTS)
    result = []
    for (_, layout, method, options), used in of_most_samples(usual).items():
        most = used[0]["samples"]
        name = f"{method}, {layout}" if method in METHODS[:4] else f"headfuse {in_words(layout)}, {method}"
        seeds = f", mean of {len(used)} samples of it" if len(used) > 1 else ""
        seeds += f", `{options}`" if options else ""
        result.append((name, gaps(used, base, texts), f"{most} windows{seeds}"))
    return result


def in_words(layout: str) -> str:
    """A layout as the command line has it."""
    return re.sub(r", reads (\d+)$", r", `--cross-layer \1`", layout)


def grouped(found: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Rows by a key, in their order."""
    groups: dict[Key, list[Row]] = {}
    for row in found:
        groups.setdefault(key(row), []).append(row)
    return groups


def of_most_samples(own: Iterable[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows of headfuse by budget, layout, conversion and more options: those of the most text, one for each seed.

    Plans of equal counts are left out, and those of other allocators where there are rows of `auto`, the default.
    """
    allocated = (row for row in own if row["conversion"] != "source" and "+" not in row["allocator"])
    groups = grouped(allocated, lambda r: (r["budget"], r["layout"], r["conversion"], r.get("options", "")))
    most = {key: max(row["samples"] for row in group) for key, group in groups.items()}
    of_most = {key: [row for row in group if row["samples"] == most[key]] for key, group in groups.items()}
    return {key: [row for row in group if row["allocator"] == "auto"] or group for key, group in of_most.items()}


def best_of(group: Iterable[Row]) -> Row:
    """The row of the least NLL over its texts, of a peer's settings."""
    return min(group, key=lambda row: sum(row["nll"].values()))


def gaps(group: list[Row], base: Row, texts: list[str]) -> list[float]:
    """Mean NLL of some rows minus that of the source, on every text."""
    return [round(sum(row["nll"][text] for row in group) / len(group) - base["nll"][text], 3) for text in texts]


def text_of(model: str) -> str:
    """The file that a model was calibrated on."""
    return CALIBRATION.get(model, "redpajama_train.jsonl")


def share(kept: str) -> float:
    """A fraction as a number."""
    top, _, bottom = kept.partition("/")
    return float(top) / float(bottom or 1)


if __name__ == "__main__":
    main()
