"""Quality gates: limits on the figures of `headfuse eval` and `fuse`, for CI. Pure, except for reading the YAML file.

Grammar: `FIGURE<=NUMBER` or `FIGURE>=NUMBER`, several joined by commas; `NUMBER*baseline` stands for that multiple of
the baseline's figure. `FIGURE@PART` is the figure of a domain, a position, a length or task of prompts, or a
task's metric. A YAML file holds gates as a list under `gates`. docs/reference/gates.md.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from headfuse.config.packaged import packaged
from headfuse.errors import ConfigError
from headfuse.estimates import paired_stderr

MODEL_METRICS = ("nll", "perplexity", "kv_bytes_per_token", "parameters")
COMPARISON_METRICS = ("ppl_ratio", "nll_gap", "kv_ratio", "kl", "top1_agreement", "decode_ratio")
EXACT_METRICS = ("kv_bytes_per_token", "parameters", "kv_ratio")
PROMPT_METRICS = ("passkey", "ruler")
AGREEMENT_METRICS = ("kl", "top1_agreement", "nll_gap")
TASK_METRICS = (*PROMPT_METRICS, "tasks_mean")
FUSE_METRICS = ("nll", "perplexity", "kv_bytes_per_token", "ppl_ratio", "nll_gap", "kv_ratio")
_GATE = re.compile(
    r"\s*([A-Za-z][\w.-]*)(?:@([\w.+/-]+))?\s*(<=|>=)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(\*\s*baseline)?\s*"
)


def _digits(number: float) -> str:
    """Every digit of a number: a rounded limit would be another one."""
    return repr(number).removesuffix(".0")


@dataclass(frozen=True)
class Gate:
    """One limit: `metric`, or its `part`, against `limit`, or against `limit` times the baseline's figure."""

    metric: str
    at_most: bool
    limit: float
    times_baseline: bool
    part: str | None = None

    def __str__(self) -> str:
        part = f"@{self.part}" if self.part else ""
        limit = f"{_digits(self.limit)}{'*baseline' * self.times_baseline}"
        return f"{self.metric}{part}{'<=' if self.at_most else '>='}{limit}"


@dataclass(frozen=True)
class GateResult:
    """The verdict of a gate; `value` and `threshold` are None if a figure is missing, and then the gate fails.

    `stderr` is the standard error of value minus threshold: against a multiple of the baseline, that of the paired
    differences. `samples` counts `unit`.
    """

    gate: str
    value: float | None
    threshold: float | None
    stderr: float | None
    samples: int | None
    unit: str
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """As in the document of `--json`."""
        return asdict(self)

    def __str__(self) -> str:
        if self.value is None:
            value = "no such figure here"
        else:
            value = f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")
        threshold = "none" if self.threshold is None else _digits(self.threshold)
        size = "" if self.samples is None else f", {self.samples} {self.unit}"
        return f"gate {self.gate}: {'passed' if self.passed else 'FAILED'}, {value} against {threshold}{size}"


@dataclass(frozen=True)
class _Figure:
    """A figure that a gate can read: the model's, the baseline's if there is one, and their standard errors."""

    value: float | None
    stderr: float | None
    samples: int | None
    unit: str
    baseline: float | None = None
    baseline_stderr: float | None = None
    difference_stderr: float | None = None


def read_gates(text: str, known: Sequence[str] | None = None) -> list[Gate]:
    """Read gates from the value of `--gate`: a YAML file, the name of a packaged one (`ci-gate`), or gates as text.

    Args:
        text: the option's text.
        known: the only figures there are; None for those of `eval`, where other names are tasks.

    Raises:
        ConfigError: naming every problem at once.
    """
    if not text.strip(" ,"):  # an unset variable of a script: nothing would be judged
        raise ConfigError("no gates are given", where="--gate", fix='give gates such as "ppl_ratio<=1.05", or none')
    if "=" in text:
        return _parse([part for part in text.split(",") if part.strip()], "--gate", known)
    path = Path(text)
    try:
        file = path if path.is_file() else packaged("gates").get(text, path)
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise ConfigError(
            f"cannot be read as gates: {reason}", where=text, fix='give a YAML file or gates such as "ppl_ratio<=1.05"'
        ) from None
    listed = raw.get("gates") if isinstance(raw, dict) and set(raw) == {"gates"} else None
    if not isinstance(listed, list) or not listed:
        raise ConfigError("must hold one key, gates, with a list", where=text, fix="see configs/gates/ci-gate.yaml")
    return _parse([str(line) for line in listed], text, known)


def _parse(lines: Sequence[str], where: str, only: Sequence[str] | None) -> list[Gate]:
    own, gates, problems = only or (*MODEL_METRICS, *COMPARISON_METRICS, *TASK_METRICS), list[Gate](), list[str]()
    for line in lines:
        match = _GATE.fullmatch(line)
        try:
            limit = float(match[4]) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or not math.isfinite(limit):
            problems.append(f"{line.strip()!r} is not FIGURE<=NUMBER, FIGURE>=NUMBER or FIGURE<=NUMBER*baseline")
        elif match[1] not in own and (only or difflib.get_close_matches(match[1], own, 1, 0.8)):
            near = difflib.get_close_matches(match[1], own, 1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(own)}"
            problems.append(f"{match[1]!r} is not a figure of {'fuse' if only else 'eval'}{hint}")
        elif match[5] and match[1] in COMPARISON_METRICS:
            problems.append(f"{match[1]!r} is already a comparison with the baseline")
        elif match[2] and match[1] in (set(own) - {*PROMPT_METRICS, *AGREEMENT_METRICS} if not only else own):
            problems.append(f"{match[1]!r} has no parts")
        else:
            gates.append(Gate(match[1], match[3] == "<=", limit, bool(match[5]), match[2]))
    if problems:
        raise ConfigError("; ".join(problems), where=where, fix="the grammar is in docs/reference/gates.md")
    return gates


def judge(gates: Sequence[Gate], document: Mapping[str, Any]) -> list[GateResult]:
    """Judge the document of `headfuse eval` or `fuse`; what is missing or not a number fails.

    Where a gate names several tasks or lengths of prompts, each has its own threshold; the worst verdict is given.
    """
    return [
        min((_verdict(gate, figure) for figure in _figures(gate, document)), key=lambda result: _margin(gate, result))
        for gate in gates
    ]


def _verdict(gate: Gate, figure: _Figure) -> GateResult:
    reference = figure.baseline if gate.times_baseline else 1.0
    threshold = None if reference is None else gate.limit * reference
    passed, error = False, figure.stderr
    if figure.value is not None and threshold is not None:
        passed = figure.value <= threshold if gate.at_most else figure.value >= threshold
    if gate.times_baseline:
        error = paired_stderr(figure.stderr, figure.baseline_stderr, figure.difference_stderr, gate.limit)
    return GateResult(str(gate), figure.value, threshold, error, figure.samples, figure.unit, passed)


def _margin(gate: Gate, result: GateResult) -> float:
    """How far a value is within its limit: negative beyond it, minus infinity where there is none to compare."""
    if result.value is None or result.threshold is None:
        return -math.inf
    margin = result.value - result.threshold
    return -math.inf if math.isnan(margin) else -margin if gate.at_most else margin


def _figures(gate: Gate, document: Mapping[str, Any]) -> list[_Figure]:
    """The figures that a gate names: of prompts those of every task and length that match, else one."""
    if gate.metric in PROMPT_METRICS:
        entries = [entry for entry in document.get(gate.metric, []) if gate.part in (None, *_parts(entry))]
        figures = [_paired(entry, _prompts(entry)) for entry in entries]
    else:
        figures = [figure for figure in [_figure(gate, document)] if figure]
    return figures or [_Figure(None, None, None, "")]


def _figure(gate: Gate, document: Mapping[str, Any]) -> _Figure | None:
    model, baseline = document["model"], document.get("baseline") or {}
    comparison, agreement = document.get("comparison") or {}, document.get("agreement")
    name = gate.metric
    windows = None if name in EXACT_METRICS else document.get("windows")
    if name in AGREEMENT_METRICS and agreement and (gate.part or name not in comparison):
        parts = [*agreement["domains"], *agreement["positions"], agreement["overall"]]
        found = next((part[name] for part in parts if part["part"] == (gate.part or "all")), None)
        return None if found is None else _Figure(found["value"], found["stderr"], found["samples"], "tokens")
    if name == "decode_ratio":
        speed = document.get("speed")
        return speed and _Figure(speed["ratio"], None, speed["rounds"], "rounds")
    if name in MODEL_METRICS:
        paired = comparison.get("nll_gap_stderr") if name == "nll" else None
        return _Figure(
            model.get(name), model.get(f"{name}_stderr"), windows, "windows",
            baseline.get(name), baseline.get(f"{name}_stderr"), paired,
        )  # fmt: skip
    if name in COMPARISON_METRICS:
        return _Figure(comparison.get(name), comparison.get(f"{name}_stderr"), windows, "windows")
    if name == "tasks_mean":
        entry = document.get("tasks_mean")
    else:
        wanted = [entry for entry in document.get("tasks", []) if entry["task"] == name]
        named = (e for e in wanted if gate.part in (e["metric"], e["metric"].partition("/")[0]))  # or without filter
        entry = next(named if gate.part else (e for e in wanted if e["main"]), None)
    return None if entry is None else _paired(entry, "questions")


def _paired(entry: Mapping[str, Any], unit: str) -> _Figure:
    """The figure of an entry whose questions, or prompts, both models answered."""
    mine, theirs, difference = entry["model"], entry["baseline"] or {}, entry["difference"] or {}
    return _Figure(
        mine["value"], mine["stderr"], mine["samples"], unit,
        theirs.get("value"), theirs.get("stderr"), difference.get("stderr"),
    )  # fmt: skip


def _parts(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """How a gate may name an entry of passkey or ruler: its length, its task, or `task/length`."""
    length, task = str(entry["length"]), entry.get("task")
    return (length,) if task is None else (length, task, f"{task}/{length}")


def _prompts(entry: Mapping[str, Any]) -> str:
    """What the sample of an entry of passkey or ruler consists of."""
    return f"prompts{' of ' + entry['task'] if entry.get('task') else ''} at {entry['length']}"
