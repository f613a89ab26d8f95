"""docs/reference/json.md and plan.md name every key that the commands write, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from headfuse.plan import FusionPlan, LayerPlan
from tests.support.commands import run
from tests.support.tiny_models import tiny_model

FOLDER = Path(__file__).parents[2] / "docs/reference"
TEXT = ("--samples", 4, "--sequence-length", 32)


def named(page: str, heading: str) -> set[str]:
    """The keys in the first cells of a section's table; without a table, all words in backticks."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return set(re.findall(r"`(\w+)`", " ".join(cells) if cells else section))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A document of every command."""
    folder = tmp_path_factory.mktemp("json")
    model, fused, text = tiny_model(folder / "model"), folder / "fused", ("--data", folder / "text.txt", *TEXT)
    lines: dict[str, tuple[object, ...]] = {
        "analyze": ("analyze", model, *text),
        "fuse": ("fuse", model, "--layout", "gqa", "--preset", "fast", "-o", fused, *text),
        "uptrain": ("uptrain", fused, "--data", text[1], "--tokens", 64, "--sequence-length", 16, "-o", folder / "up"),
        "eval": ("eval", fused, "--baseline", model, *text),
        "export": ("export", fused, "--to", "layerwise", "-o", folder / "out"),
        "report": ("report", fused, "-o", folder / "report.html"),
        "doctor": ("doctor",),
    }
    return {name: json.loads(run(*line, "--json").splitlines()[-1]) for name, line in lines.items()}


@pytest.mark.parametrize("command", ["analyze", "fuse", "uptrain", "eval", "export", "report", "doctor"])
def test_every_key_is_described(documents: dict[str, dict[str, Any]], command: str) -> None:
    described = named("json.md", command) - {"layers", "key"} if command == "analyze" else named("json.md", command)
    written = set(documents[command]) - ({"layers"} if command == "analyze" else set())
    assert described == written


def test_every_key_of_a_plan_is_described() -> None:
    described = set(re.findall(r"`(\w+)`", " ".join(
        line.split("|")[1] for line in (FOLDER / "plan.md").read_text().splitlines() if line.startswith("| `")
    )))  # fmt: skip
    assert described == {*FusionPlan.model_fields, *LayerPlan.model_fields}
