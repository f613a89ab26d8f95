"""Runs tasks of lm-evaluation-harness and keeps the score of each question, so that models are compared in pairs."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.errors import ConfigError, DataError, MissingExtraError
from headfuse.estimates import Estimate, mean, mean_of


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task: the mean over its questions, the baseline's, and that of the paired differences."""

    task: str
    metric: str
    main: bool
    higher_is_better: bool
    model: Estimate
    baseline: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class TasksMean:
    """The mean accuracy of several tasks, the baseline's, and that of the paired differences."""

    tasks: int
    model: Estimate
    baseline: Estimate | None
    difference: Estimate | None


Scores = Mapping[tuple[str, str], Mapping[int, float]]
"""By task and metric, the score of each question."""

STANDARD = "standard"
"""Tag of the tasks that scripts/get_tasks.py writes."""
_ACCURACIES = ("acc", "acc_norm")
_WRITE = (
    "`python scripts/get_tasks.py FOLDER` of headfuse's repository writes them, from PyPI alone; "
    "then give --tasks-path FOLDER"
)


class Harness:
    """The tasks of lm-evaluation-harness, read before any model is.

    Args:
        names: task names; groups and tags give all their tasks.
        folders: of local task files; names there win over the harness's own. Data files that a task names are looked
            for from the folder of `--tasks-path` that has the task.
        limit: how many questions of each, from the first; None for all.

    Raises:
        MissingExtraError: where lm-eval is not installed.
        ConfigError: for names that are no tasks, `standard` where no folder has it.
        DataError: for a task whose data cannot be loaded.
    """

    def __init__(self, names: Sequence[str], folders: Sequence[str] = (), limit: int | None = None) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise MissingExtraError(
                "lm-evaluation-harness is not installed", where="--tasks", fix='pip install "headfuse[tasks]"'
            )
        for folder in folders:
            if not Path(folder).is_dir():
                raise ConfigError("no such folder", where=folder, fix="give the folder of the task files")
        with _calm():
            self.tasks = _load_tasks(names, [str(Path(folder).resolve()) for folder in folders])
        self.limit = limit

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> Scores:
        """The score of each question in each metric that is a mean over questions."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _calm():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
            found: Any = simple_evaluate(
                wrapped, tasks=list(self.tasks.values()), limit=self.limit, bootstrap_iters=0, log_samples=True
            )
        scores: dict[tuple[str, str], dict[int, float]] = {}
        for task, samples in found["samples"].items():
            for sample in samples:
                for metric in sample["metrics"]:
                    if isinstance(sample[metric], int | float):
                        name, score = _named(metric, float(sample[metric]))
                        scores.setdefault((task, name), {}).setdefault(sample["doc_id"], score)
        return scores

    def compare(self, model: Scores, baseline: Scores | None) -> list[TaskResult]:
        """Means and paired differences; the first metric of a task's file is its main one."""
        results, seen = list[TaskResult](), set[str]()
        for (task, metric), scores in self._in_order(model):
            other = None if baseline is None else baseline[task, metric]
            higher = metric != "nll" and self.tasks[task].higher_is_better().get(metric, True)
            results.append(
                TaskResult(
                    task, metric, task not in seen, higher, mean(list(scores.values())),
                    None if other is None else mean(list(other.values())),
                    None if other is None else mean([score - other[doc] for doc, score in scores.items()]),
                )
            )  # fmt: skip
            seen.add(task)
        return results

    def _in_order(self, scores: Scores) -> list[tuple[tuple[str, str], Mapping[int, float]]]:
        """The scores by task; each task's metrics in the order of its file."""
        tasks = list(dict.fromkeys(task for task, _ in scores))

        def place(key: tuple[str, str]) -> tuple[int, int]:
            metrics = [_named(metric, 0.0)[0] for metric in self.tasks[key[0]].higher_is_better()]
            return tasks.index(key[0]), metrics.index(key[1]) if key[1] in metrics else len(metrics)

        return sorted(scores.items(), key=lambda item: place(item[0]))


def _named(metric: str, score: float) -> tuple[str, float]:
    """A question's score and its name; where the harness computes a perplexity, the score is a log-likelihood."""
    return ("nll", -score) if metric == "perplexity" else (metric, score)


def mean_accuracy(results: Sequence[TaskResult]) -> TasksMean | None:
    """The mean over the tasks whose main metric is an accuracy, each weighing the same; None of fewer than two."""
    parts = [result for result in results if result.main and result.metric in _ACCURACIES]
    if len(parts) < 2:
        return None
    differences = [part.difference for part in parts if part.difference is not None]
    baselines = [part.baseline for part in parts if part.baseline is not None]
    return TasksMean(
        len(parts),
        mean_of([part.model for part in parts]),
        mean_of(baselines) if baselines else None,
        mean_of(differences) if differences else None,
    )


def _load_tasks(names: Sequence[str], folders: Sequence[str]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    local = TaskManager(include_path=list(folders), include_defaults=False)
    if STANDARD in set(names) - set(local.all_tasks):
        raise ConfigError("no folder has the standard tasks", where="--tasks", fix=_WRITE)
    manager = local if set(names) <= set(local.all_tasks) else TaskManager(include_path=list(folders))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"no task is named {', '.join(unknown)}",
            where="--tasks",
            fix="`lm-eval ls tasks` lists those of the harness",
        )
    tasks: dict[str, Any] = {}
    for name in _without_tags(names, manager.task_index):
        file = manager.task_index[name].yaml_path
        home = next((folder for folder in folders if file and Path(file).is_relative_to(folder)), None)
        try:
            with _working_folder(home):
                tasks.update(manager.load([name])["tasks"])
        except Exception as error:  # datasets, the hub and the harness raise many kinds
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(
                f"task {name} cannot be loaded: {reason}",
                where="--tasks",
                fix="its data comes from the hub, or, for a task of --tasks-path, from the files that it names",
            ) from None
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise ConfigError(
            f"{', '.join(unsafe)} would run code that the model writes", where="--tasks",
            fix="leave it out, or run it with lm-eval itself, which can be told to",
        )  # fmt: skip
    return tasks


def _without_tags(names: Sequence[str], index: Mapping[str, Any]) -> list[str]:
    """The names, with each tag replaced by its tasks, because each task has its own folder of data files."""
    found = [member for name in names for member in (sorted(index[name].tags) if _is_tag(index[name]) else [name])]
    return list(dict.fromkeys(found))


def _is_tag(entry: Any) -> bool:
    return str(entry.kind.name) == "TAG"


@contextlib.contextmanager
def _working_folder(folder: str | None) -> Iterator[None]:
    """Run in the folder of a task, because `datasets` looks for relative data files in the working directory."""
    before = Path.cwd()
    if folder is not None:
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Hide progress bars and messages of the harness, and of the programs that it calls."""
    logger, level, stderr = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level, os.dup(2)
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        logger.setLevel(level)
