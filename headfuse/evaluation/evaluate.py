"""What a model predicts and what its KV cache weighs, alone or against a baseline: every figure of `headfuse eval`."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.checkpoint.folder import resolve_model
from headfuse.checkpoint.reader import Checkpoint
from headfuse.config.values import data_name
from headfuse.errors import CheckpointError, ConfigError
from headfuse.estimates import Estimate, clustered_mean, mean
from headfuse.evaluation.agreement import Agreement, agreement
from headfuse.evaluation.capacity import FORMULA, Fit, fit, kv_bytes_per_token, stored_dtype
from headfuse.evaluation.passkey import Retrieval, passkey_prompts, retrieve
from headfuse.evaluation.perplexity import (
    EvaluationText,
    Predictions,
    evaluation_text,
    nll_protocol,
    predict,
    token_nll,
)
from headfuse.evaluation.speed import DecodeSpeed, decode_speed
from headfuse.evaluation.tasks import Harness, Scores, TaskResult
from headfuse.models.config import read_config
from headfuse.models.loading import (
    check_context,
    check_tokens,
    guard_embeddings,
    load_model,
    load_tokenizer,
    model_name,
    unembedded_tokens,
    warn_of_unembedded,
)
from headfuse.models.weights import report_weights
from headfuse.text.documents import DEFAULT_DATA, read_documents

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFigures:
    """The figures of one model; `nll_stderr` is the standard error over windows, None for a single window."""

    name: str
    nll: float
    nll_stderr: float | None
    perplexity: float | None
    kv_bytes_per_token: int
    kv_dtype: str
    parameters: int
    weight_bytes: int
    fit: Fit | None = None


@dataclass(frozen=True)
class Comparison:
    """A model against its baseline: `kv_ratio` and `ppl_ratio` are model over baseline, `nll_gap` model minus baseline.

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
class EvaluationResult:
    """What `evaluate` measured, and how."""

    model: ModelFigures
    baseline: ModelFigures | None
    comparison: Comparison | None
    agreement: Agreement | None
    tasks: list[TaskResult]
    passkey: list[PasskeyResult]
    speed: DecodeSpeed | None
    data: str
    windows: int
    sequence_length: int
    stride: int
    predictions: int
    protocol: str
    memory_formula: str | None
    limit: int | None
    seed: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Measured:
    """One model's figures, and what is compared with the other's in pairs."""

    figures: ModelFigures
    predictions: Predictions
    nll: torch.Tensor
    scores: Scores
    retrievals: list[Retrieval]


def evaluate(
    model: str,
    *,
    data: str = DEFAULT_DATA,
    baseline: str | None = None,
    samples: int = 24,
    sequence_length: int = 512,
    stride: int | None = None,
    tasks: Sequence[str] = (),
    tasks_path: Sequence[str] = (),
    limit: int | None = None,
    passkey: Sequence[int] = (),
    passkey_trials: int = 10,
    memory: int | None = None,
    speed: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    seed: int | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> EvaluationResult:
    """Measure a causal LM, fused or not, and compare it with a baseline.

    One model is in memory at a time, with the other's last hidden states (windows x length x hidden size numbers);
    `speed` alone needs both.

    Args:
        model: a model folder or hub id.
        data: the text, as `text.read_documents` takes it; its field `source` names a document's domain.
        baseline: a second model, of the same tokenizer.
        samples: how many windows; fewer are taken, with a warning, where the text ends.
        sequence_length: tokens in a window.
        stride: tokens from one window's begin to the next; by default the windows are independent.
        tasks: task names of lm-evaluation-harness.
        tasks_path: folders of local task files.
        limit: questions of each task; None for all.
        passkey: context lengths, in tokens, of the retrieval test.
        passkey_trials: prompts of each length.
        memory: bytes, for what fits beside the weights.
        speed: measure decoding against the baseline.
        device: `auto`, `cpu`, `cuda` or `mps`.
        dtype: the dtype of the computation; by default float32 on a CPU.
        threads: CPU threads.
        trust_remote_code: run code that comes with the model.
        seed: shuffle the documents; by default they are read in the order of the file.
        on_stage: called with the name of each stage as it begins.

    Raises:
        HeadfuseError: for a model, baseline, text or task that cannot be used.
    """
    stride = sequence_length if stride is None else stride
    if samples < 1 or sequence_length < 2:
        raise ConfigError(
            f"{samples} samples of {sequence_length} tokens hold no prediction", fix="give 1 and 2 or more"
        )
    if not 1 <= stride <= sequence_length:
        raise ConfigError(
            f"{stride} is not between 1 and the window's {sequence_length} tokens",
            where="--stride",
            fix="leave it out for independent windows",
        )
    if speed and baseline is None:
        raise ConfigError("there is nothing to compare the speed with", where="--speed", fix="give --baseline")
    if data == DEFAULT_DATA:
        logger.warning("no --data: the packaged text is generic prose; give text of the kind that the model is used on")
    if threads is not None:
        torch.set_num_threads(threads)
    names = [name for name in (model, baseline) if name is not None]
    folders = [resolve_model(name) for name in names]
    configs = [read_config(folder, trust_remote_code) for folder in folders]
    for config in configs:
        check_context(config, sequence_length)
        for length in passkey:
            check_context(config, length, "--passkey")
    for folder, config in zip(folders, configs, strict=True):
        report_weights(folder, config)
    tokenizers = [load_tokenizer(folder, trust_remote_code) for folder in folders]
    texts = [
        evaluation_text(
            read_documents(data, seed=seed, tokenizer=tokenizer), tokenizer, sequence_length, samples, stride, data
        )
        for tokenizer in tokenizers
    ]
    text = texts[0]
    beyond = [
        unembedded_tokens(tokenizer, config.get_text_config().vocab_size)
        for tokenizer, config in zip(tokenizers, configs, strict=True)
    ]
    for tokens, folder in zip(beyond, folders, strict=True):
        warn_of_unembedded(tokens, folder)
        check_tokens(text.windows, tokens, folder)
    if not torch.equal(text.windows, texts[-1].windows):
        raise ConfigError(
            "tokenises the text differently, so the figures per token cannot be compared",
            where=f"baseline {baseline}",
            fix="give a baseline with the model's own tokenizer, such as the source model",
        )
    if len(text.windows) < samples:
        logger.warning("the text holds %d windows, fewer than the %d asked for", len(text.windows), samples)
    for length in passkey:
        passkey_prompts(tokenizers[0], length, 1)
    harness = Harness(tasks, tasks_path, limit) if tasks else None

    measured = []
    for name, folder, tokenizer, tokens in zip(names, folders, tokenizers, beyond, strict=True):
        on_stage(f"evaluating {model_name(name)}")
        loaded = load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        guard_embeddings(loaded, tokens, folder)
        one = _measure(model_name(name), folder, loaded, tokenizer, text, harness, passkey, passkey_trials)
        if memory is not None:
            context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
            fits = fit(memory, one.figures.weight_bytes, one.figures.kv_bytes_per_token, sequence_length, context)
            one = replace(one, figures=replace(one.figures, fit=fits))
        measured.append(one)
        del loaded
        gc.collect()
    mine, theirs = measured[0], measured[1] if baseline is not None else None
    measured_speed = None
    if speed:
        on_stage("measuring decode speed")
        pair = [load_model(f, device=device, dtype=dtype, trust_remote_code=trust_remote_code) for f in folders]
        measured_speed = decode_speed(pair[0], pair[1], text.windows[:1])
    return EvaluationResult(
        model=mine.figures,
        baseline=theirs.figures if theirs else None,
        comparison=_compare(mine, theirs, text) if theirs else None,
        agreement=agreement(mine.predictions, theirs.predictions, text, mine.nll, theirs.nll) if theirs else None,
        tasks=harness.compare(mine.scores, theirs.scores if theirs else None) if harness else [],
        passkey=[_retrieved(length, mine, theirs) for length in passkey],
        speed=measured_speed,
        data=data_name(data),
        windows=len(text.windows),
        sequence_length=sequence_length,
        stride=stride,
        predictions=int(text.scored.sum()),
        protocol=nll_protocol(text, stride, shuffled=seed is not None),
        memory_formula=FORMULA if memory is not None else None,
        limit=limit,
        seed=seed,
    )


def _measure(
    name: str,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: EvaluationText,
    harness: Harness | None,
    passkey: Sequence[int],
    passkey_trials: int,
) -> _Measured:
    checkpoint = Checkpoint(folder)
    kv_dtype = stored_dtype(checkpoint)
    predictions = predict(model, text.windows)
    losses = token_nll(predictions, text.windows)
    if not torch.isfinite(losses).all():
        raise CheckpointError("the model's predictions are not finite", where=folder, fix="its weights are damaged")
    nll = clustered_mean(losses, text.scored)
    assert nll is not None
    figures = ModelFigures(
        name=name,
        nll=nll.value,
        nll_stderr=nll.stderr,
        perplexity=_exp(nll.value),
        kv_bytes_per_token=kv_bytes_per_token(model.config, kv_dtype.itemsize),
        kv_dtype=str(kv_dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=checkpoint.nbytes,
    )
    scores = harness.run(model, tokenizer) if harness else {}
    retrievals = retrieve(model, tokenizer, passkey, passkey_trials)
    return _Measured(figures, predictions, losses, scores, retrievals)


def _compare(model: _Measured, baseline: _Measured, text: EvaluationText) -> Comparison:
    gap = clustered_mean(model.nll - baseline.nll, text.scored)
    assert gap is not None
    ratio = _exp(gap.value)
    return Comparison(
        kv_ratio=model.figures.kv_bytes_per_token / baseline.figures.kv_bytes_per_token,
        ppl_ratio=ratio,
        ppl_ratio_stderr=None if ratio is None or gap.stderr is None else ratio * gap.stderr,  # delta method
        nll_gap=gap.value,
        nll_gap_stderr=gap.stderr,
    )


def _retrieved(length: int, model: _Measured, baseline: _Measured | None) -> PasskeyResult:
    mine = [r for r in model.retrievals if r.length == length]
    theirs = [] if baseline is None else [r for r in baseline.retrievals if r.length == length]
    pairs = list(zip(mine, theirs, strict=True)) if theirs else []
    return PasskeyResult(
        length=length,
        model=mean([float(r.found) for r in mine]),
        model_nll=mean([r.nll for r in mine]),
        baseline=mean([float(r.found) for r in theirs]) if theirs else None,
        baseline_nll=mean([r.nll for r in theirs]) if theirs else None,
        difference=mean([float(a.found) - float(b.found) for a, b in pairs]) if pairs else None,
    )


def _exp(value: float) -> float | None:
    """The exponential, None where it is beyond a float."""
    return math.exp(value) if value < 700 else None
