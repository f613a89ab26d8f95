"""Runs tasks of lm-evaluation-harness and keeps the score of each question, so that models are compared in pairs."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.errors import ConfigError, DataError, MissingExtraError
from headfuse.estimates import Estimate, mean, mean_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task: the mean over its questions, the baseline's, and that of the paired differences.

    Of a task with several filters, `metric` is `METRIC/FILTER`.
    """

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
_MEANS = ("mean", "nanmean", "median", "perplexity")
"""Ways of the harness to make one figure of the scores of questions; its others take no scores, but pairs."""
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
        context: tokens that every model reads; of longer requests the beginning is cut. None for the harness's choice.

    Raises:
        MissingExtraError: where lm-eval is not installed.
        ConfigError: for names that are no tasks, `standard` where no folder has it; for a task that has no score for
            each question, as far as its file says so.
        DataError: for a task whose data cannot be loaded.
    """

    def __init__(
        self, names: Sequence[str], folders: Sequence[str] = (), limit: int | None = None, context: int | None = None
    ) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise MissingExtraError(
                "lm-evaluation-harness is not installed", where="--tasks", fix='pip install "headfuse[tasks]"'
            )
        for folder in folders:
            if not Path(folder).is_dir():
                raise ConfigError("no such folder", where=folder, fix="give the folder of the task files")
        with _calm():
            self.tasks = _load_tasks(names, [str(Path(folder).resolve()) for folder in folders])
        _refuse_pairs(self.tasks)
        self.limit, self.context, self._counted = limit, context, False

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ConfigError for a tokenizer without the tokens that the harness begins and ends texts with."""
        generates = any(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.values())
        if tokenizer.eos_token_id is None and (generates or tokenizer.bos_token_id is None):
            raise ConfigError(
                "the tokenizer has no EOS token, which the harness needs", where="--tasks",
                fix="set eos_token in tokenizer_config.json, or leave --tasks out",
            )  # fmt: skip

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> Scores:
        """The score of each question in each metric that is a mean over questions."""
        from lm_eval import simple_evaluate

        from headfuse.evaluation.harness_model import CountingModel

        with _calm():
            wrapped = CountingModel(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal", max_length=self.context
            )
            found: Any = simple_evaluate(
                wrapped, tasks=list(self.tasks.values()), limit=self.limit, bootstrap_iters=0, log_samples=True
            )
        if wrapped.cut and not self._counted:  # every model is asked the same
            logger.warning(
                "Requests of --tasks that are longer than %d tokens and lose their beginning, for every model: %d",
                wrapped.max_length, wrapped.cut,
            )  # fmt: skip
        self._counted = True
        scores: dict[tuple[str, str], dict[int, float]] = {}
        for task, samples in found["samples"].items():
            filtered = len({sample["filter"] for sample in samples}) > 1
            for sample in samples:
                for metric in sample["metrics"]:
                    if isinstance(sample[metric], int | float):
                        name, score = _named(metric, float(sample[metric]))
                        name += f"/{sample['filter']}" * filtered
                        scores.setdefault((task, name), {}).setdefault(sample["doc_id"], score)
        return scores

    def compare(self, model: Scores, baseline: Scores | None) -> list[TaskResult]:
        """Means and paired differences; the first metric of a task's file is its main one.

        What is not a number for some question is left out, with a warning.
        """
        results, seen = list[TaskResult](), set[str]()
        for (task, metric), scores in self._in_order(model):
            other, main = None if baseline is None else baseline[task, metric], task not in seen
            seen.add(task)
            if not all(map(math.isfinite, [*scores.values(), *(other or {}).values()])):
                logger.warning("%s of task %s is left out: it is not a number for some question", metric, task)
                continue
            higher = metric != "nll" and self.tasks[task].higher_is_better().get(_unfiltered(metric), True)
            results.append(
                TaskResult(
                    task, metric, main, higher, mean(list(scores.values())),
                    None if other is None else mean(list(other.values())),
                    None if other is None else mean([score - other[doc] for doc, score in scores.items()]),
                )
            )  # fmt: skip
        for task in self.tasks.keys() - seen:
            logger.warning("task %s has no score for each question, and is left out", task)
        return results

    def _in_order(self, scores: Scores) -> list[tuple[tuple[str, str], Mapping[int, float]]]:
        """The scores by task; each task's metrics in the order of its file."""
        tasks = list(dict.fromkeys(task for task, _ in scores))

        def place(key: tuple[str, str]) -> tuple[int, int]:
            metrics = [_named(metric, 0.0)[0] for metric in self.tasks[key[0]].higher_is_better()]
            metric = _unfiltered(key[1])
            return tasks.index(key[0]), metrics.index(metric) if metric in metrics else len(metrics)

        return sorted(scores.items(), key=lambda item: place(item[0]))


def _named(metric: str, score: float) -> tuple[str, float]:
    """A question's score and its name; where the harness computes a perplexity, the score is a log-likelihood."""
    return ("nll", -score) if metric == "perplexity" else (metric, score)


def _unfiltered(metric: str) -> str:
    """The metric in `METRIC/FILTER`."""
    return metric.partition("/")[0]


def mean_accuracy(results: Sequence[TaskResult]) -> TasksMean | None:
    """The mean over the tasks whose main metric is an accuracy, each weighing the same; None of fewer than two."""
    parts = [result for result in results if result.main and _unfiltered(result.metric) in _ACCURACIES]
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


def _refuse_pairs(tasks: Mapping[str, Any]) -> None:
    """Raise ConfigError for a task whose metrics are all of its questions together, as the perplexity of words is."""
    for name, task in tasks.items():
        ways = task.aggregation()
        together = [
            metric for metric, way in ways.items()
            if way.__module__ == "lm_eval.api.metrics" and way.__name__ not in _MEANS
        ]  # fmt: skip
        own = callable(task.get_config("process_results"))  # its metrics may be anything
        if len(together) == len(ways) and not own:
            raise ConfigError(
                f"task {name} has no score for each question, only figures of all of them: {', '.join(ways)}",
                where="--tasks",
                fix="leave it out: models are compared question by question",
            )


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
