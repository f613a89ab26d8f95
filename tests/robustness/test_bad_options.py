"""Bad options: one message that says what and what to do, exit code 1 or 2, and no output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from headfuse.cli.app import app
from tests.robustness.refusals import SMALL, refused
from tests.support.commands import run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bugdet: {total: 0.5}", ["bugdet", "'budget'"]),
        ("budget: {totl: 0.5}\ncalibration: {sample: 8}\nmethod: subspaces",
         ["'total'", "'samples'", "'subspace'"]),
        ("budget: {total: [1]}\nseed: x", ["budget.total", "seed"]),
        ("budget: 3", ["budget"]),
        ("budget: {total: .nan}", ["budget.total"]),
        ("budget: {total: 2}", ["out of range"]),
        ("budget: {total: 0.5, key_heads: [1, 1], value_heads: [1, 1]}", ["not both"]),
        ("budget: {keep_layers: [7]}", ["keep_layers"]),
        ("budget: {min_key_heads: 9}", ["min_key_heads"]),
        ("layout: gqa\nbudget: {total: 0.75, keep_layers: [0]}", ["gqa"]),
        ("calibration: {held_out: 1}", ["held_out"]),
        ("calibration: {samples: 1}", ["samples"]),
        ("budget: {total: 0}", ["out of range"]),
        ("budget: {total: abc}", ["not a number"]),
        ("budget: {allocator: unifrom}", ["'uniform'"]),
        ("layout: gpa\nmethod: 3\nseed: -1", ["layout", "method", "seed"]),
    ],
)  # fmt: skip
def test_bad_yaml(model: Path, tmp_path: Path, text: str, expected: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    message = refused(tmp_path / "out", model, "--config", tmp_path / "bad.yaml", "--data", tmp_path / "text.txt")
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a list", "mapping"),
        ("a: [", "not valid YAML"),
        ("seed: 2024-13-45", "month"),
        (f"seed: {'9' * 5000}", "digits"),
        ("budget: {total: 0.5}\nbudget: {total: 0.75}", "'budget' is there twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_files_that_are_no_yaml_of_options(model: Path, tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    message = run("fuse", model, "-o", tmp_path / "out", "--config", tmp_path / "bad.yaml", code=1)
    assert "bad.yaml" in message
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_unknown_packaged_config(model: Path, tmp_path: Path) -> None:
    assert "headfuse-25" in refused(tmp_path / "out", model, "--config", "headfuse-26")


@pytest.mark.parametrize("budget", ["0", "-1", "1.5", "nan", "inf", "abc", "", "1/0", "1e-999999999"])
def test_bad_budgets_are_usage_errors(model: Path, tmp_path: Path, budget: str) -> None:
    assert "--budget" in refused(tmp_path / "out", model, f"--budget={budget}", code=2)


@pytest.mark.parametrize("layout", ["decoupled", "gqa"])
def test_a_budget_below_one_head_names_the_smallest(model: Path, tmp_path: Path, layout: str) -> None:
    assert "1/4" in refused(tmp_path / "out", model, "--budget", "0.1", "--layout", layout)


def test_bad_options(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "did you mean 'align'" in refused(out, model, "--method", "aling")
    assert "--for" in refused(out, model, "--for", "sglang", "--layout", "decoupled")
    refused(out, model, "--layout", "other", code=2)
    assert "positions" in refused(out, model, "--sequence-length", 4096)
    assert "--threads" in refused(out, model, "--threads", 10**6, code=2)  # more than the system gives: a crash
    if not torch.cuda.is_available():
        assert "--device" in refused(
            out, model, "--device", "cuda", "--data", tmp_path / "text.txt", "--sequence-length", 32
        )


def test_a_failure_that_nobody_foresaw_is_one_message(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("headfuse.conversion.convert.plan_model", fail)
    line = ["fuse", str(model), "-o", str(tmp_path / "out"), "--data", str(tmp_path / "text.txt"), *map(str, SMALL)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1
    assert "\nerror: unexpected ZeroDivisionError: division by zero\n  " in result.output
    assert "--verbose" in result.output
    assert isinstance(CliRunner().invoke(app, [*line, "--verbose"]).exception, ZeroDivisionError)
    result = CliRunner().invoke(app, [*line, "--json"])
    assert "ZeroDivisionError" in json.loads(result.stdout)["error"]["what"]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("args", [("--nosuch",), ("--samples", "x"), ("--samples", "1"), ("--device", "abacus")])
def test_usage_errors_in_json(model: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    assert args[0] in refused(tmp_path / "out", model, *args, code=2)
