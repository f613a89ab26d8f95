"""The table of peers: `python benchmarks/peers_page.py` writes it into docs/results/peers.md.

Reads benchmarks/results/peers.jsonl (peers.py) and the rows of benchmarks/results/quality.jsonl (quality.py) that were
calibrated on the same text. Of a peer's settings at a budget the table has the best, ours over several seeds the mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PEERS, OURS = Path("benchmarks/results/peers.jsonl"), Path("benchmarks/results/quality.jsonl")
PAGE = Path("docs/results/peers.md")
BEGIN = "<!-- Written by `python benchmarks/peers_page.py`. -->"
END = "<!-- The end of what is written. -->"
TEXTS = ("wikitext2", "redpajama")
CALIBRATION = "redpajama_train.jsonl"
NAMES = {"transmla": "TransMLA", "care": "CARE", "palu": "Palu"}
METHODS = ("first", "mean", "align", "dha", "fast", "balanced", "best")
READS = ("latent, reads 1", "latent, reads 3", "latent, reads 5")
LAYOUTS = ("latent", *READS, "decoupled", "gqa", "gqa, wide", "layerwise")
Row = dict[str, Any]


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
    lines = []
    for model in dict.fromkeys(row["model"] for row in peers):
        theirs = [row for row in peers if row["model"] == model]
        own = [row for row in ours if row["model"] == model]
        base = next(row for row in own + theirs if "source" in (row.get("conversion"), row.get("kept")))
        lines += ["", f"## {model}", "Source: " + ", ".join(f"NLL {base['nll'][text]:.3f} on {text}" for text in TEXTS)]
        lines += [
            "",
            "| kept | method | NLL added, " + " | NLL added, ".join(TEXTS) + " | settings |",
            "|---|---|---|---|---|",
        ]
        budgets = {row["kept"] for row in theirs} - {"source", "1"}
        for kept in sorted(budgets, key=lambda kept: -share(kept)):
            found = [*peer_lines(theirs, kept, base), *own_lines(own, kept, base)]
            best = [min((line[1][i] for line in found), default=0.0) for i in range(len(TEXTS))]
            for method, gaps, settings in sorted(found, key=lambda line: line[1][0]):
                cells = [f"**{gap:.3f}**" if gap == best[i] else f"{gap:.3f}" for i, gap in enumerate(gaps)]
                lines.append(f"| {kept} | {method} | {' | '.join(cells)} | {settings} |")
    return "\n".join(lines)


def peer_lines(theirs: list[Row], kept: str, base: Row) -> list[tuple[str, list[float], str]]:
    """Method, NLL added and settings of the best row of every peer and method, by the mean of the texts."""
    groups: dict[str, list[Row]] = {}
    for row in theirs:
        if row["kept"] == kept:
            method = row["settings"].get("method", "")
            groups.setdefault(NAMES[row["peer"]] + (f", {method}" if method else ""), []).append(row)
    result = []
    for name, group in groups.items():
        row = min(group, key=lambda row: sum(row["nll"][text] for text in TEXTS))
        settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items() if key != "method")
        settings += f"; best of {len(group)}" if len(group) > 1 else ""
        result.append((name, gaps([row], base), settings or "its own"))
    return result


def own_lines(own: list[Row], kept: str, base: Row) -> list[tuple[str, list[float], str]]:
    """Those of headfuse, the mean of its seeds; plans of equal counts and the smaller of two samples are left out."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in own:
        usual = row["calibration"] == CALIBRATION and "+" not in row["allocator"] and row["layout"] in LAYOUTS
        if usual and row["budget"] == kept and set(TEXTS) <= set(row["nll"]):
            groups.setdefault((row["layout"], row["conversion"]), []).append(row)
    result = []
    for (layout, method), group in groups.items():
        most = max(row["samples"] for row in group)
        used = [row for row in group if row["samples"] == most]
        name = f"{method}, {layout}" if method in METHODS[:4] else f"headfuse {layout}, {method}"
        seeds = f", mean of {len(used)} samples of it" if len(used) > 1 else ""
        result.append((name, gaps(used, base), f"{most} windows{seeds}"))
    return result


def gaps(group: list[Row], base: Row) -> list[float]:
    """Mean NLL of some rows minus that of the source, on every text."""
    return [round(sum(row["nll"][text] for row in group) / len(group) - base["nll"][text], 3) for text in TEXTS]


def share(kept: str) -> float:
    """A fraction as a number."""
    top, _, bottom = kept.partition("/")
    return float(top) / float(bottom or 1)


if __name__ == "__main__":
    main()
