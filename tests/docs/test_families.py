"""What the documents say of model families is what the tables hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headfuse.layouts import layerwise
from headfuse.layouts.gguf import writer as gguf
from headfuse.modeling.configuration_family import FAMILIES
from headfuse.models.families import ARCHITECTURES, UNSUPPORTED

ROOT = Path(__file__).parents[2]
README, TABLE, RUNTIMES, LAYOUTS = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/reference/families.md", "docs/runtimes.md", "docs/reference/layouts.md")
)
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines() if line.startswith("| ")]
REFUSED = [row for row in ROWS if len(row) == 2]
ROWS = [row for row in ROWS if len(row) == 4]
OF_FAMILY = {family: row for row in ROWS[1:] for family in re.sub(r"\(.*?\)", "", row[0]).replace(" ", "").split(",")}


def test_the_readme_counts_the_families() -> None:
    assert re.findall(r"\[(\d+) families\]", README) == [str(len(ARCHITECTURES))]


def test_the_table_has_every_family_once() -> None:
    named = [family for row in ROWS[1:] for family in re.sub(r"\(.*?\)", "", row[0]).replace(" ", "").split(",")]
    assert sorted(named) == sorted(ARCHITECTURES)


def test_refused_families_have_their_reason() -> None:
    said = {family: reason for families, reason in REFUSED[1:] for family in families.split(", ")}
    fused = ("headfuse", "headfuse_latent", "nemotron-nas")
    assert said == {family: reason for family, reason in UNSUPPORTED.items() if family not in fused}


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_table_says_what_an_entry_says(family: str) -> None:
    _, layouts, keys, _ = OF_FAMILY[family]
    arch = ARCHITECTURES[family]
    exists = {"gqa": arch.stock_gqa, "decoupled": family in FAMILIES, "layerwise": family in layerwise.FAMILIES}
    assert set(re.findall(r"`(\w+)`", layouts)) == {name for name, there in exists.items() if there}
    assert keys.startswith("not rotated") == (arch.rotary == "none")
    assert ("interleaved" in keys) == (arch.rotary == "interleaved")
    assert ("in part" in keys) == arch.partial_rotary
    assert ("norm" in keys) == (arch.key_norm is not None)
    assert arch.norm_option is None or arch.norm_option in keys


@pytest.mark.parametrize(
    ("text", "start", "families"),
    [
        (LAYOUTS, r"counts differ by layer \(", layerwise.FAMILIES),
        (TABLE, r"`--to gguf` writes ", gguf.FAMILIES),
        (RUNTIMES, r"below\)\. Families: ", gguf.FAMILIES),
    ],
)
def test_lists_of_families_in_prose(text: str, start: str, families: dict[str, object]) -> None:
    found = re.findall(start + r"((?:\w+(?:, | and )?)+?)(?:\)|;|,? and refuses)", text)
    assert [sorted(re.split(", | and ", names)) for names in found] == [sorted(families)]
