"""`analyze --curves`: what every layout is predicted to lose at every budget."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from tests.support.commands import run
from tests.support.tiny_models import tiny_model


def text_of(model: Path) -> tuple[str, ...]:
    return "--data", str(model.parent / "text.txt"), "--samples", "8", "--sequence-length", "32", "--preset", "fast"


def test_every_layout_of_a_family_has_a_falling_curve(tmp_path: Path) -> None:
    model, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    line = run("analyze", model, "--curves", *text_of(model), "-o", out, "--json").splitlines()[-1]
    curves = json.loads(line)["curves"]
    assert set(curves) == {"decoupled", "layerwise", "gqa", "latent", "gqa, wide"}
    for points in curves.values():
        for one, next_one in pairwise(points):
            assert one["kv_ratio"] < next_one["kv_ratio"]
            assert one["nll_gap"] >= next_one["nll_gap"] >= 0
    assert [point["kv_ratio"] for point in curves["gqa"]] == [0.25, 0.5]
    assert (out / "curves.png").exists()


def test_layouts_that_a_model_cannot_have_are_left_out(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "gpt2")
    line = run("analyze", model, "--curves", *text_of(model), "--json").splitlines()[-1]
    assert set(json.loads(line)["curves"]) == {"decoupled", "latent"}


def test_a_method_without_wide_heads_has_no_curve_of_them(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    line = run("analyze", model, "--curves", "--method", "mean", *text_of(model), "--json").splitlines()[-1]
    assert set(json.loads(line)["curves"]) == {"decoupled", "layerwise", "gqa"}


def test_a_method_that_trains_has_none(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    output = run("analyze", model, "--curves", "--method", "dha", *text_of(model), code=1)
    assert "--curves" in output
    assert "trains" in output
