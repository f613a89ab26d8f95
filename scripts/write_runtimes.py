"""Writes the table of docs/runtimes.md from docs/runtimes.yaml: `python scripts/write_runtimes.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from headfuse.choices import Layout, names

DOCS = Path(__file__).parents[1] / "docs"
DATA, PAGE = DOCS / "runtimes.yaml", DOCS / "runtimes.md"
BEGIN = "<!-- Written by `python scripts/write_runtimes.py` from runtimes.yaml. -->"
END = "<!-- The end of what is written. -->"


def read() -> list[dict[str, Any]]:
    """One entry for each runtime, with a cell for each layout."""
    entries: list[dict[str, Any]] = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return entries


def table() -> str:
    """The table, in Markdown."""
    layouts = sorted(names(Layout), key=["gqa", "layerwise", "decoupled", "latent"].index)
    lines = ["| runtime | " + " | ".join(f"`{layout}`" for layout in layouts) + " |", "|---" * (1 + len(layouts)) + "|"]
    for entry in read():
        cells = (cell(entry[layout]) for layout in layouts)
        lines.append(f"| {entry['runtime']} {entry['version']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(entry: dict[str, Any]) -> str:
    """What a runtime does with a layout, and what says so."""
    loads = {True: "yes", False: "no"}.get(entry["loads"], entry["loads"])
    files = dict.fromkeys(test.partition("::")[0] for test in entry.get("tests", ()))
    return f"{loads}: {entry['how']} ({', '.join([*files, *entry.get('sources', ())])})"


def page() -> str:
    """docs/runtimes.md with the table of today."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
