"""What the README promises: it is short, and its tables hold what the code and the data say."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from headfuse.choices import LAYOUT_FOR, Layout, Preset, names
from headfuse.config.presets import PRESETS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")
]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("choice", [Layout, Preset])
def test_the_tables_have_every_layout_and_preset(choice: object) -> None:
    shown = [row[0].split("`")[0] for row in ROWS]
    assert [name for name in names(choice) if name not in shown] == []


@pytest.mark.parametrize("runtime", ["transformers", "vllm", "sglang"])
def test_the_layouts_name_the_runtimes_that_load_them(runtime: str) -> None:
    rows = {row[0].split("`")[0]: row[-1].lower() for row in reversed(ROWS)}  # the first table of layouts
    assert {layout for layout in names(Layout) if runtime in rows[layout]} == set(LAYOUT_FOR[runtime])
    page = (ROOT / "docs/reference/layouts.md").read_text(encoding="utf-8")
    (listed,) = re.findall(rf"^\| `{runtime}` \| (.*) \|$", page, re.MULTILINE)
    assert re.findall(r"`(\w+)`", listed) == list(LAYOUT_FOR[runtime])


@pytest.mark.parametrize("layout", ["gqa", "decoupled"])
def test_the_figures_are_those_of_the_benchmark(layout: str) -> None:
    lines = (ROOT / "benchmarks/results/quality.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["model"] == "smollm2-135m"]
    (source,) = (row["nll"]["wikitext2"] for row in rows if row["conversion"] == "source")
    (shown,) = (row[1:] for row in ROWS if row[0] == layout and re.fullmatch(r"[\d.]+", row[2]))
    for figure, conversion, samples in zip(shown, ("mean", "fast", "balanced", "best"), (16, 16, 16, 128), strict=True):
        wanted = {"budget": "1/3", "layout": layout, "conversion": conversion, "samples": samples}
        own = [row for row in rows if wanted.items() <= row.items() and "+" not in row["allocator"]]
        gaps = [row["nll"]["wikitext2"] - source for row in own]
        assert figure == (f"{statistics.mean(gaps):.3f}" if figure else "")
    assert f"source {source:.3f}" in README


@pytest.mark.parametrize(("preset", "claim", "most"), [("fast", "about 3", 3.5), ("balanced", "at most 15", 15.0)])
def test_the_costs_of_presets_are_those_of_the_benchmark(preset: str, claim: str, most: float) -> None:
    lines = (ROOT / "benchmarks/results/quality.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["model"] == "smollm2-135m" and row["conversion"] == preset]
    priced = [row for row in rows if "seconds" in row and row["layout"] in ("gqa", "decoupled", "latent")]
    allocated = [row for row in priced if "+" not in row["allocator"]]
    assert max(row["seconds"] / row["forward_seconds"] for row in allocated) <= most
    (shown,) = (row[2] for row in ROWS if row[0].startswith(preset))
    assert shown == claim
    assert claim in PRESETS[preset].cost


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_says_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")
