"""The result of `evaluate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from headfuse.estimates import Estimate
from headfuse.evaluation.agreement import Agreement
from headfuse.evaluation.capacity import Fit
from headfuse.evaluation.speed import DecodeSpeed
from headfuse.evaluation.tasks import TaskResult, TasksMean


@dataclass(frozen=True)
class ModelFigures:
    """The figures of one model; `nll_stderr` is the standard error over windows, None for a single window.

    `kv_scale_bytes_per_token` are those of `kv_bytes_per_token` that hold the scales of a quantised cache.
    """

    name: str
    nll: float
    nll_stderr: float | None
    perplexity: float | None
    kv_bytes_per_token: int
    kv_scale_bytes_per_token: int
    kv_dtype: str
    parameters: int
    weight_bytes: int
    fit: Fit | None = None


@dataclass(frozen=True)
class Comparison:
    """A model against its baseline: `kv_ratio` and `ppl_ratio` are model / baseline, `nll_gap` is model - baseline.

    The standard error of the gap is that of the paired differences, window by window.
    """

    kv_ratio: float
    ppl_ratio: float | None
    ppl_ratio_stderr: float | None
    nll_gap: float
    nll_gap_stderr: float | None


@dataclass(frozen=True)
class PasskeyResult:
    """Retrieval at one length: the share of keys found, the NLL of the key's tokens, and paired differences."""

    length: int
    model: Estimate
    model_nll: Estimate
    baseline: Estimate | None
    baseline_nll: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class RulerResult:
    """A task of long contexts at one length: the share of right answers, and the paired differences."""

    task: str
    length: int
    model: Estimate
    baseline: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured, and how."""

    model: ModelFigures
    baseline: ModelFigures | None
    comparison: Comparison | None
    agreement: Agreement | None
    tasks: list[TaskResult]
    tasks_mean: TasksMean | None
    passkey: list[PasskeyResult]
    ruler: list[RulerResult]
    speed: DecodeSpeed | None
    data: str
    windows: int
    sequence_length: int
    stride: int
    predictions: int
    protocol: str
    cache_dtype: str | None
    cache_protocol: str | None
    memory_formula: str | None
    limit: int | None
    seed: int | None
    dtype: str | None
    """The dtype that was asked for; None for the default."""
    tasks_path: list[str]
    """Names of the folders of local task files."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
