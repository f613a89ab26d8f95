"""eval --ruler: prompts that fill their length, RULER's score, greedy answers, gates, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headfuse.choices import RulerTask, names
from headfuse.errors import ConfigError
from headfuse.evaluation.gates import judge, read_gates
from headfuse.evaluation.result import RulerResult
from headfuse.evaluation.ruler import Question, answer, ruler_questions, ruler_results, score
from headfuse.evaluation.ruler_prompts import PUZZLES
from tests.support.commands import run
from tests.support.tiny_models import tiny_model

BUNDLED = Path(__file__).parents[2] / "examples/mha-6m"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(BUNDLED)
    return loaded


def test_tasks_are_those_of_the_option() -> None:
    assert set(PUZZLES) == set(names(RulerTask))


@pytest.mark.parametrize("task", PUZZLES)
def test_prompts_fill_the_length_and_hold_the_answers(task: RulerTask, tokenizer: PreTrainedTokenizerBase) -> None:
    questions = ruler_questions(tokenizer, task, 1500, 3)
    assert questions == ruler_questions(tokenizer, task, 1500, 3)
    assert questions != ruler_questions(tokenizer, task, 1500, 3, seed=1)
    assert len({question.answers for question in questions}) == 3
    for question in questions:
        assert 1300 < len(question.ids) + question.room <= 1500
        text = str(tokenizer.decode(question.ids))
        assert score(text, question.answers) == 1
        # the end of the prompt asks, and does not tell
        assert score(text[text.rindex("Question:" if "Question:" in text else "What ") :], question.answers) == 0


def prompt(tokenizer: PreTrainedTokenizerBase, task: RulerTask, length: int = 1500) -> tuple[str, tuple[str, ...]]:
    question = ruler_questions(tokenizer, task, length, 1)[0]
    return str(tokenizer.decode(question.ids)), question.answers


@pytest.mark.parametrize(
    ("task", "keys", "needles", "answers"),
    [
        ("niah_single", 1, 1, 1),
        ("niah_multikey", 4, 4, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needles(task: RulerTask, keys: int, needles: int, answers: int, tokenizer: PreTrainedTokenizerBase) -> None:
    text, right = prompt(tokenizer, task)
    found = re.findall(r"special magic numbers for (\S+) is: (\d{7})\.", text)
    assert (len({key for key, _ in found}), len(found), len(right)) == (keys, needles, answers)
    question = text[text.rindex("What ") :]
    assert [value for key, value in found if key in question] == sorted(right, key=text.index)


def test_a_chain_of_variables(tokenizer: PreTrainedTokenizerBase) -> None:
    text, right = prompt(tokenizer, "vt")
    value = re.findall(r"assigned the value (\d{5})", text)[-1]
    held: dict[str, str] = {}
    for name, given in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text):
        held[name] = held.get(given, given)
    assert {name for name, number in held.items() if number == value} == set(right)
    assert len(right) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(1500, 6, 1), (5000, 30, 3)])
def test_common_words(length: int, often: int, seldom: int, tokenizer: PreTrainedTokenizerBase) -> None:
    text, right = prompt(tokenizer, "cwe", length)
    listed = re.findall(r"\d+\. ([a-z]+)", text[text.rindex("Below is") :])
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, count in counts.items() if count == often} == set(right)
    assert set(counts.values()) == {often, seldom}
    assert len(right) == 10


def test_the_score_is_the_share_of_answers_in_the_text() -> None:
    assert score("They are ABC, 12 and more", ["abc", "12", "13", "MORE"]) == 0.75
    assert score("", ["1"]) == 0


class Scripted(nn.Module):
    """Says the tokens that it was given, one a call."""

    def __init__(self, ids: list[int], vocabulary: int, end: int | list[int] | None) -> None:
        super().__init__()
        self.ids, self.vocabulary, self.calls = ids, vocabulary, 0
        self.generation_config, self.device = SimpleNamespace(eos_token_id=end), torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> SimpleNamespace:
        logits = torch.zeros(1, 1, self.vocabulary)
        logits[..., self.ids[min(self.calls, len(self.ids) - 1)]] = 1
        self.calls += 1
        return SimpleNamespace(logits=logits, past_key_values=None)


@pytest.mark.parametrize(
    ("said", "room", "end", "expected", "calls"),
    [
        ("12345 and 777", 99, None, 1.0, None),  # stops when nothing can be added
        ("12345 and more", 20, None, 0.5, 20),
        ("no", 7, None, 0.0, 7),
        ("12345<end>777", 99, "<end>", 0.5, None),  # and at the end of the text
    ],
)
def test_answers(
    said: str, room: int, end: str | None, expected: float, calls: int | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in said.split("<end>")]
    stop = tokenizer.eos_token_id
    ids = [*parts[0], *([stop, *parts[1]] if len(parts) > 1 else [])]
    model: Any = Scripted(ids, len(tokenizer), None if end is None else [stop])
    question = Question("niah_multivalue", 50, [5, 6], ("12345", "777"), room)
    found = answer(model, tokenizer, [question])
    assert [one.score for one in found] == [expected]
    assert calls is None or model.calls == calls
    assert model.calls <= room


def test_through_the_command(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2000}))
    text = ("--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 16, "--json")
    line = (
        "eval",
        model,
        "--baseline",
        model,
        *text,
        "--ruler",
        "1200,1300",
        "--ruler-tasks",
        "vt",
        "--ruler-trials",
        2,
    )
    document = json.loads(run(*line, "--gate", "ruler@vt/1300>=1*baseline").splitlines()[-1])
    assert [(entry["task"], entry["length"]) for entry in document["ruler"]] == [("vt", 1200), ("vt", 1300)]
    assert [entry["model"]["samples"] for entry in document["ruler"]] == [2, 2]
    assert document["ruler"][0]["difference"]["value"] == 0
    assert [gate["passed"] for gate in document["gates"]] == [True]


def test_means_and_gates() -> None:
    def answers(*scores: float) -> list[Any]:
        return [
            SimpleNamespace(task=task, length=length, score=score)
            for (task, length), score in zip(
                [("vt", 512), ("vt", 512), ("cwe", 512), ("vt", 1024)], scores, strict=True
            )
        ]  # fmt: skip

    results = ruler_results(answers(1.0, 0.5, 0.2, 0.4), answers(1.0, 1.0, 0.2, 0.8))
    assert [(r.task, r.length, r.model.value) for r in results] == [
        ("vt", 512, 0.75),
        ("cwe", 512, 0.2),
        ("vt", 1024, 0.4),
    ]
    assert results[0].difference is not None
    assert (results[0].difference.value, results[0].difference.stderr) == (-0.25, 0.25)
    document = {"model": {}, "ruler": [_plain(r) for r in results]}
    gates = "ruler>=0.2,ruler@vt>=0.4,ruler@512>=0.2,ruler@vt/512>=0.75,ruler@vt/2048>=0"
    judged = judge(read_gates(gates), document)
    assert [(g.value, g.passed) for g in judged] == [(0.2, True), (0.4, True), (0.2, True), (0.75, True), (None, False)]


def _plain(result: RulerResult) -> dict[str, Any]:
    estimates = {name: vars(getattr(result, name)) for name in ("model", "baseline", "difference")}
    return {"task": result.task, "length": result.length, **estimates}


def test_refusals(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="do not hold") as caught:
        ruler_questions(tokenizer, "cwe", 512, 1)
    fewest = int(re.findall(r"give (\d+)", str(caught.value.fix))[0])
    assert ruler_questions(tokenizer, "cwe", fewest, 1)
    model = tiny_model(tmp_path / "model")  # reads 128 tokens
    for options, words in (
        (("--ruler", "x"), "is not a list of token counts"),
        (("--ruler", ""), "names nothing"),
        (("--ruler", "4096"), "128"),
        (("--ruler", "100", "--ruler-tasks", "niah_singel"), "did you mean 'niah_single'"),
    ):
        document = json.loads(run("eval", model, *options, "--json", code=1).splitlines()[-1])
        assert words in f"{document['error']['what']} {document['error']['fix']}"
