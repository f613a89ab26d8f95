"""The table of runtimes: from its data file, whose every entry names a test or a source with its version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import write_runtimes

from headfuse.choices import LAYOUT_FOR, Layout, names

ROOT = Path(__file__).parents[2]
ENTRIES = write_runtimes.read()
CELLS = [
    pytest.param(entry[layout], id=f"{entry['runtime']}-{layout}") for entry in ENTRIES for layout in names(Layout)
]


def test_the_page_has_the_table_of_the_data() -> None:
    assert write_runtimes.PAGE.read_text(encoding="utf-8") == write_runtimes.page()


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_names_a_test_or_a_source_with_its_version(cell: dict[str, Any]) -> None:
    assert cell["loads"] in (True, False, "partly")
    assert bool(cell.get("tests")) != bool(cell.get("sources"))
    for test in cell.get("tests", ()):
        file, _, function = test.partition("::")
        assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8")
    assert all(re.search(r"\d+\.\d+|\d{4}-\d{2}", source) for source in cell.get("sources", ()))


def test_for_takes_the_layouts_that_load() -> None:
    by_name = {entry.get("name", entry["runtime"]): entry for entry in ENTRIES}
    for runtime, layouts in LAYOUT_FOR.items():
        assert {layout for layout in names(Layout) if by_name[runtime][layout]["loads"] is True} == set(layouts)
