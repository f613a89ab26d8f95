"""Tasks through lm-evaluation-harness, from local files."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/tasks"
RECORDS = {
    "arc_easy": {"question": "what was it", "choices": ["the head", "a key", "a value"]},
    "piqa": {"goal": "read a key", "choices": ["the head reads", "no more"]},
    "winogrande": {"sentence": "the head reads the value and _ was given", "choices": ["the head", "the value"]},
}
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    shutil.copytree(ROOT / "examples/tasks", folder)
    for name, record in RECORDS.items():
        lines = [json.dumps({**record, "answer": i % 2}) for i in range(6)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def evaluate(model: Path, *args: object) -> dict[str, Any]:
    text = model.parent / "text.txt"
    line = run("eval", model, "--data", text, "--samples", 2, "--sequence-length", 16, "--json", *args)
    document: dict[str, Any] = json.loads(line.splitlines()[-1])
    return document


def directly(model: Path, folder: Path, names: list[str], monkeypatch: pytest.MonkeyPatch, limit: int | None) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    arguments = f"pretrained={model},dtype=float32"
    return lm_eval.simple_evaluate(
        "hf", model_args=arguments, tasks=list(names), task_manager=manager, device="cpu", batch_size=8, limit=limit,
        bootstrap_iters=0,
    )["results"]  # fmt: skip


@needs_harness
def test_a_task_that_runs_code_of_the_model_is_refused_first(tmp_path: Path, tasks: Path) -> None:
    model = tiny_model(tmp_path / "model")
    file = tasks / "piqa.yaml"
    file.write_text(file.read_text() + "\nunsafe_code: true\n")
    line = (
        "eval",
        model,
        "--data",
        tmp_path / "text.txt",
        "--sequence-length",
        16,
        "--tasks",
        "piqa",
        "--tasks-path",
        tasks,
    )
    assert "would run code that the model writes" in " ".join(run(*line, code=1).split())


@pytest.mark.long
@needs_harness
def test_scores_are_those_of_the_harness(tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model")
    found = evaluate(model, "--tasks", ",".join(RECORDS), "--tasks-path", tasks)["tasks"]
    wanted = directly(model, tasks, list(RECORDS), monkeypatch, None)
    assert {entry["task"] for entry in found} == set(RECORDS)
    for entry in found:
        assert entry["model"]["value"] == pytest.approx(wanted[entry["task"]][f"{entry['metric']},none"])
        assert entry["model"]["samples"] == 6


@needs_harness
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("decoupled", marks=pytest.mark.long),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("layerwise", "gqa")),
    ],
)
def test_fused_models_of_every_layout_against_their_source(tmp_path: Path, tasks: Path, layout: str) -> None:
    model = tiny_model(tmp_path / "model")
    fuse(model, tmp_path / "fused", "--budget", 0.5, "--layout", layout, "--preset", "fast")
    arguments = ("--tasks", "arc_easy", "--tasks-path", tasks, "--limit", 4, "--baseline", model)
    document = evaluate(tmp_path / "fused", *arguments, "--gate", "arc_easy>=0*baseline,arc_easy@acc_norm<=1")
    entry = document["tasks"][0]
    assert (entry["metric"], entry["main"], entry["model"]["samples"]) == ("acc", True, 4)
    assert entry["difference"]["value"] == pytest.approx(entry["model"]["value"] - entry["baseline"]["value"])
    assert [gate["unit"] for gate in document["gates"]] == ["questions", "questions"]


@needs_harness
def test_tasks_that_are_none(tmp_path: Path, tasks: Path) -> None:
    model = tiny_model(tmp_path / "model")
    (tasks / "piqa.jsonl").unlink()
    text = ("--data", tmp_path / "text.txt", "--sequence-length", 16)
    assert "piqa" in run("eval", model, *text, "--tasks", "piqa", "--tasks-path", tasks, code=1)
    assert "no such folder" in run("eval", model, *text, "--tasks", "piqa", "--tasks-path", tmp_path / "no", code=1)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    model = tiny_model(tmp_path / "model")
    output = run("eval", model, "--data", tmp_path / "text.txt", "--sequence-length", 16, "--tasks", "piqa", code=1)
    assert 'pip install "headfuse[tasks]"' in output


@needs_harness
@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/tasks")
def test_the_bundled_model_on_the_real_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(ROOT / "examples/tasks", folder)
    for file in DATA.glob("*.jsonl"):
        shutil.copy(file, folder)
    model = ROOT / "examples/mha-6m"
    options = ("--samples", 2, "--sequence-length", 16, "--limit", 50)
    line = run("eval", model, *options, "--tasks", ",".join(RECORDS), "--tasks-path", folder, "--json")
    found = json.loads(line.splitlines()[-1])["tasks"]
    wanted = directly(model, folder, list(RECORDS), monkeypatch, 50)
    for entry in found:
        assert entry["model"]["value"] == pytest.approx(wanted[entry["task"]][f"{entry['metric']},none"])
