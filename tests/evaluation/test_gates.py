"""Gates: their grammar, and the exit code that CI reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from headfuse.errors import ConfigError
from headfuse.evaluation.gates import judge, read_gates
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

DOCUMENT = {
    "model": {"nll": 3.0, "nll_stderr": 0.1, "perplexity": None, "parameters": 10, "kv_bytes_per_token": 64},
    "baseline": {"nll": 2.0, "parameters": 20, "kv_bytes_per_token": 256},
    "comparison": {"ppl_ratio": float("nan"), "nll_gap": 1.0, "nll_gap_stderr": 0.05, "kv_ratio": 0.25},
    "windows": 24,
}


@pytest.mark.parametrize(
    ("gate", "passed", "threshold"),
    [
        ("kv_ratio<=0.25", True, 0.25),
        ("kv_ratio <= 2.4e-1", False, 0.24),
        ("nll>=3", True, 3.0),
        ("nll<=1.5*baseline", True, 3.0),
        ("nll<=1.4 * baseline", False, 2.8),
        ("ppl_ratio<=9", False, 9.0),  # not a number
        ("ppl_ratio>=0", False, 0.0),
        ("perplexity<=9", False, 9.0),  # beyond what a float holds
        ("perplexity<=2*baseline", False, None),
    ],
)
def test_a_gate(gate: str, passed: bool, threshold: float | None) -> None:
    (result,) = judge(read_gates(gate), DOCUMENT)
    assert result.passed is passed
    assert result.threshold == pytest.approx(threshold)
    assert result.samples == (None if gate.startswith("kv_ratio") else 24)  # a count has no sample


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "stderr": 0.1, "samples": 5}


def prompts(scores: dict[tuple[str, int], tuple[float, float]]) -> dict[str, Any]:
    """A document with these scores of a model and its baseline, by task and length."""
    entries = [
        {"task": task, "length": length, "model": estimate(a), "baseline": estimate(b), "difference": estimate(a - b)}
        for (task, length), (a, b) in scores.items()
    ]
    passkey = [{**entry, "task": None} for entry in entries if entry["task"] == "vt"]
    return {"model": {}, "ruler": entries, "passkey": passkey}


@pytest.mark.parametrize(
    ("gate", "value", "threshold", "passed"),
    [
        ("ruler>=0.9*baseline", 0.2, 0.72, False),  # cwe, which neither model solves, says nothing of vt
        ("ruler@512>=0.9*baseline", 0.7, 0.72, False),
        ("ruler@cwe>=0.9*baseline", 0.0, 0.0, True),
        ("ruler@vt>=0.5*baseline", 0.2, 0.4, False),
        ("passkey>=0.9*baseline", 0.2, 0.72, False),
        ("ruler>=0", 0.0, 0.0, True),
        ("ruler<=0.5", 0.7, 0.5, False),
        ("ruler<=1*baseline", 0.0, 0.0, True),  # nearest to its limit
        ("ruler@niah_single>=0.9", math.nan, 0.9, False),
        ("ruler>=0.1", math.nan, 0.1, False),  # worse than any number
    ],
)
def test_a_gate_judges_each_task_and_length_against_its_own_limit(
    gate: str, value: float, threshold: float, passed: bool
) -> None:
    scores = {("cwe", 512): (0.0, 0.0), ("vt", 512): (0.7, 0.8), ("vt", 1024): (0.2, 0.8)}
    document = prompts(scores | ({("niah_single", 512): (math.nan, 1.0)} if math.isnan(value) else {}))
    (result,) = judge(read_gates(gate), document)
    assert result.value == pytest.approx(value, nan_ok=True)
    assert (result.threshold, result.passed) == (pytest.approx(threshold), passed)


def test_a_gate_names_the_prompts_that_decided() -> None:
    document = prompts({("cwe", 512): (0.0, 0.0), ("vt", 1024): (0.2, 0.8)})
    ruler, passkey = judge(read_gates("ruler>=0.9*baseline,passkey>=0.5"), document)
    assert "5 prompts of vt at 1024" in str(ruler)
    assert "5 prompts at 1024" in str(passkey)


@pytest.mark.parametrize("text", ["ppl_ratio<=1.0000001", "parameters<=1234567891", "kl<=1e-12", "nll<=1.5*baseline"])
def test_a_gate_keeps_every_digit(text: str) -> None:
    (gate,) = read_gates(text)
    assert read_gates(str(gate)) == [gate]
    assert str(gate) == text


def test_a_threshold_keeps_every_digit() -> None:
    document = {**DOCUMENT, "model": {"parameters": 1234567892}, "baseline": {"parameters": 1234567891}}
    (result,) = judge(read_gates("parameters<=1*baseline"), document)
    assert "against 1234567891" in str(result)


def test_a_limit_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="1e999"):
        read_gates("nll<=1e999")


def test_a_comparison_without_baseline_fails() -> None:
    results = judge(read_gates("nll_gap<=9,nll<=9*baseline"), {**DOCUMENT, "baseline": None, "comparison": None})
    assert [result.passed for result in results] == [False, False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pl_ratio<=1,nll<1,nll<=x", ["ppl_ratio", "'nll<1'", "'nll<=x'"]),
        ("nll_gap<=1*baseline", ["already a comparison"]),
        ("nll<=1.2.3", ["1.2.3"]),
        ("kl@github>=0.5,nll@github<=1", ["'nll' has no parts"]),
        ("nowhere.yaml", ["nowhere.yaml"]),
    ],
)
def test_bad_gates_are_named_all_at_once(text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read_gates(text)
    assert all(part in str(error.value) for part in expected), error.value


@pytest.mark.parametrize("text", ["gates: []", "gates: 3", "- nll<=1", "gates: [nll<=1]\nmore: 1", "a: ["])
def test_bad_gate_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"gates\.yaml"):
        read_gates(str(tmp_path / "gates.yaml"))


def test_the_packaged_gates_are_those_of_the_repository() -> None:
    path = Path(__file__).parents[2] / "configs/gates/ci-gate.yaml"
    assert read_gates(str(path)) == read_gates("ci-gate") != []


def test_eval_exits_with_3_after_its_document(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    fuse(model, tmp_path / "out", "--budget", "0.25")
    text = ("--data", tmp_path / "text.txt", "--samples", 4, "--sequence-length", 32, "--baseline", model)
    run("eval", tmp_path / "out", *text, "--gate", "kv_ratio<=0.25,nll<=99")
    table = run("eval", tmp_path / "out", *text, "--gate", "kv_ratio<=0.2", code=3)
    assert "FAILED, 0.2500 against 0.2" in table
    output = run("eval", tmp_path / "out", *text, "--gate", "kv_ratio<=0.2", "--json", code=3)
    document = json.loads(output.splitlines()[0])
    assert document["gates"][0]["passed"] is False
    assert "kv_ratio<=0.2" in output.splitlines()[-1]


def test_gates_are_read_before_the_model(tmp_path: Path) -> None:
    assert "nll" in run("eval", tmp_path / "nothing", "--gate", "nll<1e", code=1)
