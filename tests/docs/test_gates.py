"""Every figure that a gate may name is explained, and is one that `eval` measures."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from headfuse.evaluation.agreement import PartAgreement
from headfuse.evaluation.gates import (
    AGREEMENT_METRICS,
    COMPARISON_METRICS,
    EXACT_METRICS,
    FUSE_METRICS,
    MODEL_METRICS,
    TASK_METRICS,
)
from headfuse.evaluation.result import Comparison, ModelFigures

PAGE = (Path(__file__).parents[2] / "docs/reference/gates.md").read_text(encoding="utf-8")


def names(result: type) -> set[str]:
    return {field.name for field in fields(result)}


def test_the_table_of_gates_has_every_figure() -> None:
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert listed == {*MODEL_METRICS, *COMPARISON_METRICS, *TASK_METRICS}


def test_every_figure_is_measured() -> None:
    """A gate on a figure that nothing measures would fail without saying that it can never pass."""
    assert set(MODEL_METRICS) <= names(ModelFigures)
    assert set(COMPARISON_METRICS) - {"decode_ratio"} <= names(Comparison) | names(PartAgreement)
    assert set(AGREEMENT_METRICS) <= names(PartAgreement)
    assert set(EXACT_METRICS) | set(FUSE_METRICS) <= {*MODEL_METRICS, *COMPARISON_METRICS}
