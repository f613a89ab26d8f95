"""Options in Python: by name, over a config, and what is said of those that do not exist."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import headfuse
from headfuse import EvalConfig, FuseConfig, FusionPlan, UptrainConfig
from headfuse.config.command import EVALUATE, FUSE, UPTRAIN
from headfuse.config.fuse import BudgetConfig, CalibrationConfig
from headfuse.errors import ConfigError
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("budget", [0.25, "1/4", Fraction(1, 4), {"total": "0.25"}, BudgetConfig(total="0.25")])
def test_a_budget_in_every_way(budget: Any) -> None:
    config, _ = FUSE.read(None, {"budget": budget, "layout": "gqa"})
    assert config.budget.shares == Fraction(1, 4)
    assert config.layout == "gqa"


def test_options_win_over_a_config_and_leave_the_rest() -> None:
    wanted = FuseConfig(budget=BudgetConfig(total="0.5", allocator="uniform"), seed=3)
    config, machine = FUSE.read(wanted, {"budget": 0.25, "samples": 4, "device": "cpu", "method": None})
    assert (config.budget.total, config.budget.allocator, config.seed) == ("0.25", "uniform", 3)
    assert config.calibration == CalibrationConfig(samples=4)
    assert machine.device == "cpu"
    assert FUSE.read(wanted, {})[0] is wanted
    by_name, _ = FUSE.read("headfuse-50", {"budget": {"allocator": "uniform"}})
    assert (by_name.budget.total, by_name.budget.allocator) == ("0.5", "uniform")
    recipe, _ = UPTRAIN.read("dha", {"data": ["a=1", "b=3"], "tokens": "2k", "warmup": 0})
    assert (recipe.loss, recipe.tokens, recipe.data, recipe.warmup) == ("ce", 2000, {"a": 1.0, "b": 3.0}, 0)
    assert UPTRAIN.read(recipe, {"tokens": 9})[0] == recipe.model_copy(update={"tokens": 9})
    measured, _ = EVALUATE.read(EvalConfig(samples=2), {"passkey": "512,2048", "memory": "24GB", "tasks": "a, b"})
    assert (measured.samples, measured.passkey, measured.tasks) == (2, (512, 2048), ("a", "b"))
    assert measured.memory == 24 * 10**9


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("fuse", {"buget": 0.5}, "buget: unknown key, did you mean 'budget'?"),
        ("fuse", {"sample": 4}, "sample: unknown key, did you mean 'samples'?"),
        ("fuse", {"outptu": "out"}, "outptu: unknown key, did you mean 'output'?"),
        ("analyze", {"devise": "cpu"}, "devise: unknown key, did you mean 'device'?"),
        ("uptrain", {"teachr": "m"}, "teachr: unknown key, did you mean 'teacher'?"),
        ("evaluate", {"q": 1}, "q: unknown key, known: baseline, "),
        ("fuse", {"budget": 3}, "budget.total: 3 is out of range"),
        ("fuse", {"budget": {"totl": 3}}, "budget.totl: unknown key, did you mean 'total'?"),
        ("fuse", {"layout": "gpa"}, "did you mean 'gqa'?"),
        ("fuse", {"dtype": "int8"}, "dtype is 'int8'"),
        ("fuse", {"config": EvalConfig()}, "config is of type EvalConfig"),
        ("evaluate", {"config": "nosuch"}, "nosuch: no such config"),
        ("evaluate", {"tasks": ""}, "names nothing"),
        ("evaluate", {"memory": "24 apples"}, "is not a size"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_used(tmp_path: Path, function: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(headfuse, function)(tmp_path, **options)
    assert message in str(caught.value)
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_from_fuse_to_report_in_python(tmp_path: Path) -> None:
    model, text = tiny_model(tmp_path / "model"), str(tmp_path / "text.txt")
    small: dict[str, Any] = {"data": text, "samples": 4, "sequence_length": 32, "device": "cpu"}
    assert isinstance(headfuse.analyze(model, budget=0.5, preset="fast", **small).plan, FusionPlan)
    result = headfuse.fuse(model, budget=0.5, layout="gqa", preset="fast", output=str(tmp_path / "out"), **small)
    assert (result.plan.kv_ratio, result.plan.layout) == (0.5, "gqa")
    assert headfuse.evaluate(result.output, EvalConfig(data=text, samples=4, sequence_length=32)).windows == 4
    trained = headfuse.uptrain(
        result.output, config=UptrainConfig(data={text: 1.0}, tokens=64, sequence_length=32, loss="ce"), device="cpu"
    )
    exported = headfuse.export(trained.output, "layerwise", output=str(tmp_path / "layerwise"))
    assert (exported / "config.json").is_file()
    assert headfuse.report(exported, output=str(tmp_path / "r.html")).read_text().startswith("<!doctype html>")
    for bad in ({"to": "gqb"}, {"to": "gguf", "file_type": "f64"}):
        with pytest.raises(ConfigError, match="is unknown") as caught:
            headfuse.export(model, **bad)
        assert caught.value.fix
