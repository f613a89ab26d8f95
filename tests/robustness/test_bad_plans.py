"""Bad plans, and options that contradict a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.refusals import SMALL, refused
from tests.support.commands import fuse, run
from tests.support.model_edits import edit_tensors
from tests.support.tiny_models import tiny_model


def test_bad_plans(model: Path, tmp_path: Path) -> None:
    fuse(model, tmp_path / "good", "--budget", "0.5")
    plan = tmp_path / "plan.json"
    text = (tmp_path / "good/plan.json").read_text()
    damages: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda p: p["heads"].update(num_hidden_layers=3), "layers must be numbered"),
        (lambda p: p["heads"].update(hidden_size=64), "another shape"),
        (lambda p: p["layers"][0].update(key_groups=[[0, 1], [1, 2, 3]]), "exactly one group"),
        (lambda p: p.update(method="nosuch"), "nosuch"),
        (lambda p: p.update(unknown=1), "unknown"),
    ]
    for damage, expected in damages:
        content = json.loads(text)
        damage(content)
        plan.write_text(json.dumps(content))
        assert expected in refused(tmp_path / "out", model, "--plan", plan)
    other = json.loads(text)
    other["heads"].update(num_key_value_heads=2)
    for layer in other["layers"]:
        layer.update(key_groups=[[0, 1]], value_groups=[[0, 1]])
    plan.write_text(json.dumps(other))
    assert "another shape" in refused(tmp_path / "out", model, "--plan", plan)
    plan.write_text("{")
    assert "plan.json" in refused(tmp_path / "out", model, "--plan", plan)
    assert "no such file" in refused(tmp_path / "out", model, "--plan", tmp_path / "none.json")


OTHER_THAN_THE_PLAN = {
    "method": ("--method", "mean"),
    "layout": ("--layout", "gqa"),
    "budget": ("--budget", "0.75"),
    "budget.allocator": ("--allocator", "uniform"),
    "budget.cross_layer": ("--cross-layer", "1"),
}


@pytest.mark.parametrize("name", OTHER_THAN_THE_PLAN)
def test_options_that_contradict_a_plan(model: Path, tmp_path: Path, name: str) -> None:
    fuse(model, tmp_path / "good", "--budget", "0.5")
    options = ("--plan", tmp_path / "good/plan.json", "--data", tmp_path / "text.txt", "--sequence-length", 32)
    message = refused(tmp_path / "out", model, *options, *OTHER_THAN_THE_PLAN[name])
    assert f"contradict the plan in {name}\n" in message


@pytest.mark.parametrize(
    ("option", "fits", "contradicts"),
    [
        ("keep_layers", [], [0]),
        ("min_key_heads", 1, 4),
        ("min_value_heads", 1, 4),
        ("allocator", "auto", "uniform"),
        ("min_channels", 1, 999),
        ("key_heads", None, [4, 4]),
        ("value_heads", None, [4, 4]),
    ],
)
def test_the_budget_of_a_config_and_a_plan(
    model: Path, tmp_path: Path, option: str, fits: object, contradicts: object
) -> None:
    fuse(model, tmp_path / "good", "--budget", "0.5", "--layout", "decoupled")
    config = tmp_path / "config.yaml"
    options = ("--plan", tmp_path / "good/plan.json", "--data", tmp_path / "text.txt", "--sequence-length", 32)
    config.write_text(json.dumps({"budget": {option: contradicts}}))
    message = refused(tmp_path / "out", model, *options, "--config", config)
    assert f"contradict the plan in budget.{option}\n" in message
    config.write_text(json.dumps({"budget": {option: fits}}))
    run("fuse", model, *options, "--config", config, "--output", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_runtime_that_does_not_load_the_layout_of_a_plan(model: Path, tmp_path: Path) -> None:
    fuse(model, tmp_path / "good", "--budget", "0.5")
    options = ("--plan", tmp_path / "good/plan.json", "--data", tmp_path / "text.txt", "--sequence-length", 32)
    assert "sglang does not load layout decoupled" in refused(tmp_path / "out", model, *options, "--for", "sglang")


def test_a_plan_decides_what_nobody_else_does(tmp_path: Path) -> None:
    """The default budget is too small for this model, and is neither in the name nor in the YAML of the output."""
    model = tiny_model(tmp_path / "model", kv_heads=2)
    fuse(model, tmp_path / "good", "--budget", "0.5", "--layout", "gqa")
    options = ("--plan", tmp_path / "good/plan.json", "--data", tmp_path / "text.txt", *SMALL[:4])
    out = tmp_path / "model-headfuse-0.5"
    assert str(out) in run("fuse", model, *options, "--dry-run")
    run("fuse", model, *options)
    assert (out / "plan.json").exists()
    said = (out / "headfuse.yaml").read_text()
    assert said.startswith("# headfuse fuse --config headfuse.yaml --plan plan.json ")
    assert "layout: gqa" in said
    assert not (tmp_path / "good/headfuse.yaml").read_text().startswith("# headfuse fuse --config headfuse.yaml --plan")
    again = run("fuse", model, *options, "--config", out / "headfuse.yaml", "-o", tmp_path / "again", "-q")
    assert again.strip() == str(tmp_path / "again")
    weights = [folder / "model.safetensors" for folder in (out, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_plan_of_other_weights_is_used_with_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fuse(model, tmp_path / "good", "--budget", "0.5")
    plan = ("--plan", tmp_path / "good/plan.json")
    fuse(model, tmp_path / "same", *plan)
    assert not caplog.records
    edit_tensors(model, lambda tensors: tensors["lm_head.weight"].mul_(2))
    fuse(model, tmp_path / "out", *plan)
    assert ["made on other weights" in record.message for record in caplog.records] == [True]
