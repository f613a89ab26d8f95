"""Computes the figures of one model, and of a model against its baseline, from measurements; runs no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from headfuse.choices import CacheDtype
from headfuse.estimates import Estimate, mean
from headfuse.evaluation.capacity import fit, stored_dtype
from headfuse.evaluation.passkey import Retrieval
from headfuse.evaluation.quantised_cache import StoredBytes
from headfuse.evaluation.result import Comparison, ModelFigures, PasskeyResult
from headfuse.layouts.folder import ModelFolder


def model_figures(
    name: str,
    opened: ModelFolder,
    loaded: PreTrainedModel,
    nll: Estimate,
    quantised: tuple[CacheDtype, StoredBytes] | None,
) -> ModelFigures:
    """The figures of a model: its predictions and its size.

    Args:
        name: how the result may name it.
        opened: its folder.
        loaded: the model.
        nll: per token.
        quantised: the numbers of its cache where they are simulated, and what a token takes in it.
    """
    dtype = stored_dtype(opened.checkpoint)
    stored = quantised[1] if quantised else StoredBytes(opened.kv_bytes_per_token(dtype.itemsize), 0)
    return ModelFigures(
        name=name,
        nll=nll.value,
        nll_stderr=nll.stderr,
        perplexity=exponential(nll.value),
        kv_bytes_per_token=stored.numbers + stored.scales,
        kv_scale_bytes_per_token=stored.scales,
        kv_dtype=quantised[0] if quantised else str(dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in loaded.parameters()),
        weight_bytes=opened.checkpoint.nbytes,
    )


def with_fit(figures: ModelFigures, memory: int, context: int, max_context: int | None) -> ModelFigures:
    """These figures, with the context and batch that fit into a memory beside the weights."""
    fits = fit(memory, figures.weight_bytes, figures.kv_bytes_per_token, context, max_context)
    return replace(figures, fit=fits)


def compared(model: ModelFigures, baseline: ModelFigures, gap: Estimate) -> Comparison:
    """Two models; `gap` is the mean of the paired differences of their NLL."""
    ratio = exponential(gap.value)
    return Comparison(
        kv_ratio=model.kv_bytes_per_token / baseline.kv_bytes_per_token,
        ppl_ratio=ratio,
        ppl_ratio_stderr=None if ratio is None or gap.stderr is None else ratio * gap.stderr,  # delta method
        nll_gap=gap.value,
        nll_gap_stderr=gap.stderr,
    )


def retrieved(length: int, model: Sequence[Retrieval], baseline: Sequence[Retrieval] | None) -> PasskeyResult:
    """Passkey retrieval at one length."""
    mine = [r for r in model if r.length == length]
    theirs = [] if baseline is None else [r for r in baseline if r.length == length]
    pairs = list(zip(mine, theirs, strict=True)) if theirs else []
    return PasskeyResult(
        length=length,
        model=mean([float(r.found) for r in mine]),
        model_nll=mean([r.nll for r in mine]),
        baseline=mean([float(r.found) for r in theirs]) if theirs else None,
        baseline_nll=mean([r.nll for r in theirs]) if theirs else None,
        difference=mean([float(a.found) - float(b.found) for a, b in pairs]) if pairs else None,
    )


def exponential(value: float) -> float | None:
    """The exponential; None if it overflows a float."""
    return math.exp(value) if value < 700 else None
