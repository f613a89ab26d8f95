"""Quality gates: limits on the figures of `headfuse eval`, for CI. Pure but for reading the YAML file.

Grammar: `METRIC<=NUMBER` or `METRIC>=NUMBER`, several joined by commas; `NUMBER*baseline` stands for that multiple of
the baseline's figure. A YAML file holds them as a list under `gates`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from headfuse.errors import ConfigError

MODEL_METRICS = ("nll", "perplexity", "kv_bytes_per_token", "parameters")
COMPARISON_METRICS = ("ppl_ratio", "nll_gap", "kv_ratio")
_GATE = re.compile(r"\s*(\w+)\s*(<=|>=)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(\*\s*baseline)?\s*")


@dataclass(frozen=True)
class Gate:
    """One limit: `metric` against `limit`, or against `limit` times the baseline's figure."""

    metric: str
    at_most: bool
    limit: float
    times_baseline: bool

    def __str__(self) -> str:
        return f"{self.metric}{'<=' if self.at_most else '>='}{self.limit:g}{'*baseline' * self.times_baseline}"


@dataclass(frozen=True)
class GateResult:
    """What a gate came to; `value` and `threshold` are None where a figure is missing, which fails."""

    gate: str
    value: float | None
    threshold: float | None
    stderr: float | None
    windows: int
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """As in the document of `--json`."""
        return asdict(self)


def read_gates(text: str) -> list[Gate]:
    """Gates from `--gate`: a YAML file, the name of a packaged one (`ci-gate`), or the gates themselves.

    Raises:
        ConfigError: naming every problem at once.
    """
    if "=" in text:
        return _parse([part for part in text.split(",") if part.strip()], "--gate")
    path = Path(text)
    packaged = resources.files("headfuse") / "data" / "gates" / f"{text}.yaml"
    try:
        if not path.is_file() and "/" not in text and packaged.is_file():
            content = packaged.read_text(encoding="utf-8")
        else:
            content = path.read_text(encoding="utf-8")
        raw = yaml.safe_load(content)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise ConfigError(
            f"cannot be read as gates: {reason}", where=text, fix='give a YAML file or gates such as "ppl_ratio<=1.05"'
        ) from None
    listed = raw.get("gates") if isinstance(raw, dict) and set(raw) == {"gates"} else None
    if not isinstance(listed, list) or not listed:
        raise ConfigError("must hold one key, gates, with a list", where=text, fix="see configs/ci-gate.yaml")
    return _parse([str(line) for line in listed], text)


def _parse(lines: Sequence[str], where: str) -> list[Gate]:
    known, gates, problems = MODEL_METRICS + COMPARISON_METRICS, list[Gate](), list[str]()
    for line in lines:
        match = _GATE.fullmatch(line)
        try:
            limit = float(match[3]) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or math.isnan(limit):
            problems.append(f"{line.strip()!r} is not METRIC<=NUMBER, METRIC>=NUMBER or METRIC<=NUMBER*baseline")
        elif match[1] not in known:
            near = difflib.get_close_matches(match[1], known, 1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            problems.append(f"{match[1]!r} is not a figure of eval{hint}")
        elif match[4] and match[1] in COMPARISON_METRICS:
            problems.append(f"{match[1]!r} is already a comparison with the baseline")
        else:
            gates.append(Gate(match[1], match[2] == "<=", limit, bool(match[4])))
    if problems:
        raise ConfigError("; ".join(problems), where=where, fix="the grammar is in docs/gates.md")
    return gates


def judge(gates: Sequence[Gate], document: Mapping[str, Any]) -> list[GateResult]:
    """Judge the document of `headfuse eval`; what is missing or not a number fails."""
    model, baseline, comparison = document["model"], document["baseline"] or {}, document["comparison"] or {}
    results = []
    for gate in gates:
        own = model if gate.metric in MODEL_METRICS else comparison
        value = own.get(gate.metric)
        reference = baseline.get(gate.metric) if gate.times_baseline else 1.0
        threshold = None if reference is None else gate.limit * reference
        passed = False
        if value is not None and threshold is not None:
            passed = value <= threshold if gate.at_most else value >= threshold
        results.append(
            GateResult(str(gate), value, threshold, own.get(f"{gate.metric}_stderr"), document["windows"], passed)
        )
    return results
