"""The guided tour shows the rooms as the import test has them, and names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_imports import ORDER

ROOT = Path(__file__).parents[2]
TOUR = (ROOT / "docs/how-it-works/architecture.md").read_text(encoding="utf-8")


def test_the_table_of_rooms_is_the_order_of_imports() -> None:
    rows = [line.split("|")[1] for line in TOUR.splitlines() if line.startswith("| `")]
    assert [re.findall(r"`(\w+)`", row) for row in rows] == [level for level in ORDER if level != ["__main__"]]


def test_files_of_the_tour_exist() -> None:
    named = set(re.findall(r"`([\w/]+/[\w]+\.py|[\w/]+/)`", TOUR))
    assert len(named) > 15
    missing = [name for name in named if not ((ROOT / name).exists() or (ROOT / "headfuse" / name).exists())]
    assert missing == []
