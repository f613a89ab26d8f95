"""Runs the tasks of `ruler_prompts` on a model: prompts of a length, greedy answers, and RULER's score of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.choices import RulerTask
from headfuse.errors import ConfigError
from headfuse.estimates import mean
from headfuse.evaluation.result import RulerResult
from headfuse.evaluation.ruler_prompts import PUZZLES
from headfuse.models.states import cache_argument
from headfuse.text.bos import start_token


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt, what a right answer holds, and how many tokens it may have."""

    task: RulerTask
    length: int
    ids: list[int]
    answers: tuple[str, ...]
    room: int


@dataclass(frozen=True)
class Answer:
    """The share of the right answers that a model's text holds."""

    task: RulerTask
    length: int
    score: float


def ruler_questions(
    tokenizer: PreTrainedTokenizerBase, task: RulerTask, length: int, trials: int, seed: int = 0
) -> list[Question]:
    """Prompts that fill `length` tokens together with the answer, as far as whole units of their text do.

    Raises:
        ConfigError: for a length that does not hold the task.
    """
    make, room = PUZZLES[task]
    start = start_token(tokenizer)
    questions = []
    for trial in range(trials):
        puzzle = make(random.Random(f"{seed} {task} {length} {trial}"), length)

        def ids(units: int, puzzle: Any = puzzle) -> list[int]:
            tokens: list[int] = tokenizer(puzzle.prompt(units), add_special_tokens=False, verbose=False).input_ids
            return tokens if start is None else [start, *tokens]

        fewest = len(ids(0)) + room
        if fewest > length:
            raise ConfigError(
                f"{length} tokens do not hold the {fewest} of task {task} without any filler",
                where="--ruler",
                fix=f"give {fewest + 64} or more, or leave the task out with --ruler-tasks",
            )
        low, high = 0, length if puzzle.units is None else min(length, puzzle.units)  # a unit has a token or more
        while low < high:
            middle = min((low + high + 1) // 2, 2 * low + 8)  # no text is made that is far too long
            low, high = (middle, high) if len(ids(middle)) + room <= length else (low, middle - 1)
        questions.append(Question(task, length, ids(low), puzzle.answers, room))
    return questions


def score(text: str, answers: Sequence[str]) -> float:
    """The share of the answers that a text holds, in any case: RULER's `string_match_all`."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[Answer]:
    """Let a model answer greedily, one question after the other."""
    config = model.generation_config
    end = None if config is None else config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    results = []
    for question in questions:
        tokens, cache = torch.tensor([question.ids], device=model.device), None
        said, found = list[int](), 0.0
        while len(said) < question.room and found < 1:  # more text keeps every answer that is there
            output = model(tokens, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)
            tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            said.append(int(tokens))
            if said[-1] in ends:
                break
            found = score(str(tokenizer.decode(said)), question.answers)
        results.append(Answer(question.task, question.length, found))
    return results


def ruler_results(model: Sequence[Answer], baseline: Sequence[Answer] | None) -> list[RulerResult]:
    """The mean of every task and length, and paired differences."""
    results = []
    for task, length in dict.fromkeys((one.task, one.length) for one in model):
        mine, theirs = (
            [one.score for one in answers or () if (one.task, one.length) == (task, length)]
            for answers in (model, baseline)
        )
        differences = [a - b for a, b in zip(mine, theirs, strict=True)] if theirs else []
        results.append(
            RulerResult(
                task, length, mean(mine), mean(theirs) if theirs else None, mean(differences) if theirs else None
            )
        )
    return results
