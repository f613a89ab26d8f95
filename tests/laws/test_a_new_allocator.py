"""An allocator added by docs/contributing/add_an_allocator.md: the page's own code under the laws, and a real fuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import headfuse
from headfuse.config.fuse import FuseConfig
from headfuse.planning.allocators import ALLOCATORS, Allocator
from tests.laws import test_budgets as budgets
from tests.laws.pages import code_of, entry_of
from tests.laws.tables import read_plan
from tests.support.planted_heads import plant
from tests.support.tiny_models import tiny_model

PAGE, NAME = "add_an_allocator.md", "steepest"


@pytest.fixture(autouse=True)
def steepest(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """The allocator of the page, in the table."""
    function = code_of(PAGE).steepest
    allocator: Allocator = entry_of(PAGE, NAME, Allocator=Allocator, steepest=function)
    monkeypatch.setitem(ALLOCATORS, NAME, allocator)
    return allocator


@pytest.mark.parametrize("seed", range(3))
def test_the_laws_of_budgets(seed: int) -> None:
    budgets.test_allocators_spend_the_budget_and_no_more(NAME, seed)
    budgets.test_rules_of_a_budget_hold(NAME)
    budgets.test_the_smallest_budget_that_a_refusal_names_works(NAME)


@pytest.mark.parametrize("total", range(3, 13))
def test_counts_may_have_gaps(steepest: Allocator, total: int) -> None:
    choices: Sequence[Sequence[int]] = [[1, 2, 4]] * 3
    counts = steepest.choose(total, choices, [[3.0, 2.0, 2.0, 0.0], [1.0, 0.9, 0.9, 0.0], [5.0, 1.0, 1.0, 0.0]])
    assert all(count in row for count, row in zip(counts, choices, strict=True))
    assert total - 1 <= sum(counts) <= total


def test_planted_pairs_are_found_in_a_real_fuse(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2")
    plant(model, [[0, 3], [1, 2]])
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 8, "sequence_length": 32}
    options = {"budget": {"total": "1/2"}, "layout": "decoupled", "preset": "fast", "calibration": calibration}
    config = FuseConfig.model_validate(options)
    config = config.model_copy(update={"budget": config.budget.model_copy(update={"allocator": NAME})})
    headfuse.fuse(str(model), config=config, output=tmp_path / "out")
    plan = read_plan(tmp_path / "out")
    assert plan.allocator == NAME
    assert plan.head_budget.key_heads == plan.head_budget.value_heads == (2, 2)
