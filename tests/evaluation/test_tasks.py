"""Tasks through lm-evaluation-harness, from local files."""

from __future__ import annotations

import importlib.util
import json
import re
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


def write_task(folder: Path, name: str, **fields: Any) -> None:
    """A task of four questions with the answer `a key`; functions of `scores.py` are named as `!function`."""
    questions = [json.dumps({"question": f"what was it {i}", "answer": "a key", "choices": ["a key", "no"], "gold": 0})
                 for i in range(4)]  # fmt: skip
    (folder / f"{name}.jsonl").write_text("\n".join(questions))
    task: dict[str, Any] = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "answer", **fields,
    }  # fmt: skip
    metrics = [{"metric": m, "aggregation": a, "higher_is_better": True} for m, a in task.pop("metrics").items()]
    text = json.dumps({**task, "metric_list": metrics})  # JSON is YAML, too
    (folder / f"{name}.yaml").write_text(re.sub(r'"(!function [\w.]+)"', r"\1", text))


CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}


@needs_harness
@pytest.mark.parametrize(
    "fields",
    [
        {"output_type": "loglikelihood_rolling", "metrics": {"word_perplexity": "weighted_perplexity"}},
        {**CHOICES, "metrics": {"mcc": "matthews_corrcoef", "f1": "f1"}},
        {"output_type": "generate_until", "generation_kwargs": {"until": ["x"]}, "metrics": {"bleu": "bleu"}},
    ],
)
def test_a_task_without_a_score_for_each_question_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    model, text = tiny_model(tmp_path / "model"), ("--data", tmp_path / "text.txt", "--sequence-length", 16)
    write_task(tmp_path, "whole", **fields)
    monkeypatch.setattr("headfuse.evaluation.evaluate.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    output = " ".join(run("eval", model, *text, "--tasks", "whole", "--tasks-path", tmp_path, code=1).split())
    assert "task whole has no score for each question" in output
    assert next(iter(fields["metrics"])) in output


@needs_harness
@pytest.mark.long
def test_a_score_that_is_no_number_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tmp_path / "model")
    (tmp_path / "scores.py").write_text(
        "def pairs(doc, results):\n    return {'pair': (1, 2)}\n\n\n"
        "def odd(doc, results):\n    number = 1.0 if '3' in doc['question'] else float('nan')\n"
        "    return {'odd': number, 'even': 1.0}\n"
    )
    log = {"output_type": "loglikelihood"}
    write_task(tmp_path, "pairs", **log, process_results="!function scores.pairs", metrics={"pair": "f1"})
    write_task(tmp_path, "odd", **log, process_results="!function scores.odd", metrics={"odd": "mean", "even": "mean"})
    found = evaluate(model, "--tasks", "pairs,odd", "--tasks-path", tmp_path, "--baseline", model)["tasks"]
    assert [(one["task"], one["metric"], one["main"]) for one in found] == [("odd", "even", False)]
    assert "task pairs has no score for each question" in caplog.text
    assert "odd of task odd is left out" in caplog.text


@needs_harness
@pytest.mark.long
def test_every_filter_of_a_task_has_its_score(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    filters: list[dict[str, Any]] = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("strict-match", "(never)"), ("flexible-extract", "(a key|)"))
    ]
    write_task(
        tmp_path, "filtered", output_type="generate_until", metrics={"exact_match": "mean"}, filter_list=filters,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 2, "do_sample": False}, doc_to_target="",
    )  # fmt: skip
    gates = "filtered>=0,filtered@exact_match>=0,filtered@exact_match/flexible-extract>=0"
    document = evaluate(model, "--tasks", "filtered", "--tasks-path", tmp_path, "--gate", gates)
    names = [(entry["metric"], entry["main"]) for entry in document["tasks"]]
    assert names == [("exact_match/strict-match", True), ("exact_match/flexible-extract", False)]
    scores = [entry["model"]["value"] for entry in document["tasks"]]
    assert [gate["value"] for gate in document["gates"]] == [scores[0], scores[0], scores[1]]


def shorten(model: Path, folder: Path, **changes: object) -> Path:
    """A copy of a model with changes of its config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@needs_harness
@pytest.mark.long
def test_both_models_read_prompts_of_one_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The smaller context of the two; what is cut is counted."""
    model = tiny_model(tmp_path / "model")
    short = shorten(model, tmp_path / "short", max_position_embeddings=40)
    write_task(
        tmp_path, "long", output_type="loglikelihood", metrics={"perplexity": "perplexity"},
        doc_to_text="{% if '3' in question %}{{question * 9}}{% else %}{{question}}{% endif %}",
    )  # fmt: skip
    arguments = ("--tasks", "long", "--tasks-path", tmp_path)
    (cut,) = evaluate(short, *arguments, "--baseline", model)["tasks"]
    assert cut["difference"]["value"] == 0
    assert caplog.text.count("longer than 40 tokens and lose their beginning, for every model: 1\n") == 1
    (whole,) = evaluate(model, *arguments)["tasks"]
    assert whole["model"]["value"] != cut["model"]["value"]
    assert caplog.text.count("longer than") == 1


@needs_harness
@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_a_tokenizer_without_special_tokens_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = tiny_model(tmp_path / "model")
    file = model / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "eos_token": None}
    settings |= {"bos_token": "<eos>"} if kind == "generate_until" else {}  # what generates must know an end
    file.write_text(json.dumps(settings))
    write_task(tmp_path, "one", output_type=kind, metrics={"acc" if kind == "loglikelihood" else "exact_match": "mean"})
    monkeypatch.setattr("headfuse.evaluation.evaluate.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    text = ("--data", tmp_path / "text.txt", "--sequence-length", 16)
    output = " ".join(run("eval", model, *text, "--tasks", "one", "--tasks-path", tmp_path, code=1).split())
    assert "set eos_token in tokenizer_config.json" in output


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
