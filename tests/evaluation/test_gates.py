"""Gates: their grammar, and the exit code that CI reads."""

from __future__ import annotations

import json
from pathlib import Path

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
