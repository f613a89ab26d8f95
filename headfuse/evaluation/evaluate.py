"""Every figure of `headfuse eval`: a model's predictions and the size of its KV cache, alone or against a baseline."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.choices import CacheDtype
from headfuse.config.command import EVALUATE
from headfuse.config.evaluate import EvalConfig
from headfuse.config.machine import Machine
from headfuse.config.values import data_name
from headfuse.errors import CheckpointError, ConfigError
from headfuse.estimates import clustered_mean
from headfuse.evaluation.agreement import agreement
from headfuse.evaluation.capacity import FORMULA, shortage
from headfuse.evaluation.figures import compared, model_figures, retrieved, with_fit
from headfuse.evaluation.passkey import Retrieval, passkey_prompts, retrieve
from headfuse.evaluation.perplexity import (
    EvaluationText,
    Predictions,
    evaluation_text,
    nll_protocol,
    predict,
    token_nll,
)
from headfuse.evaluation.quantised_cache import QuantisedCaches, described
from headfuse.evaluation.result import Comparison, EvaluationResult, ModelFigures
from headfuse.evaluation.ruler import Answer, Question, answer, ruler_questions, ruler_results
from headfuse.evaluation.speed import DecodeSpeed, decode_speed
from headfuse.evaluation.tasks import Harness, Scores, mean_accuracy
from headfuse.layouts.folder import ModelFolder, open_folder
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
from headfuse.text.documents import DEFAULT_DATA, read_documents

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Model:
    """A model to be measured; `name` is its name in the result."""

    name: str
    opened: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    beyond: dict[int, str]
    """Tokens that the model does not embed."""

    @property
    def folder(self) -> Path:
        return self.opened.path

    @property
    def context(self) -> int | None:
        """Its own limit of tokens, if its config names one."""
        limit: int | None = getattr(self.opened.config.get_text_config(), "max_position_embeddings", None)
        return limit


@dataclass(frozen=True)
class _Measured:
    """One model's figures, and the values that are compared in pairs with the other model's."""

    figures: ModelFigures
    predictions: Predictions
    nll: torch.Tensor
    scores: Scores
    retrievals: list[Retrieval]
    answers: list[Answer]


def evaluate(
    model: str | Path,
    config: EvalConfig | str | Path | None = None,
    *,
    on_stage: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> EvaluationResult:
    """Measure a causal LM, fused or not, and compare it with a baseline.

    One model is in memory at a time, with the other's last hidden states (windows x length x hidden size numbers);
    `speed` alone needs both.

    Args:
        model: a model folder or hub id.
        config: an `EvalConfig`, or a YAML file of its options.
        on_stage: called with the name of each stage as it begins.
        **options: those of `EvalConfig`, which win over `config`, and of `Machine`, by name.

    Raises:
        HeadfuseError: for a model, baseline, text, task or option that cannot be used.
    """
    return _evaluate(str(model), *EVALUATE.read(config, options), on_stage)


def _evaluate(model: str, config: EvalConfig, machine: Machine, on_stage: Callable[[str], None]) -> EvaluationResult:
    if config.data == DEFAULT_DATA:
        logger.warning(
            "Evaluating on bundled prose and code. Pass --data with text like your inputs for figures that count."
        )
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    models = _open([name for name in (model, config.baseline) if name is not None], config, machine)
    text = _read_text(models, config)
    for length in config.passkey:
        passkey_prompts(models[0].tokenizer, length, 1)
    questions = [
        question
        for length in config.ruler
        for task in config.ruler_tasks
        for question in ruler_questions(models[0].tokenizer, task, length, config.ruler_trials, config.seed or 0)
    ]
    harness = _harness(models, config) if config.tasks else None

    measured: list[_Measured] = []
    for one in models:
        on_stage(f"evaluating {one.name}")
        measured.append(
            _measure(one, text, harness, questions, config, machine, None if measured else config.cache_dtype)
        )
        gc.collect()
    mine, theirs = measured[0], measured[1] if config.baseline is not None else None
    if config.speed:
        on_stage("measuring decode speed")
    tasks = harness.compare(mine.scores, theirs.scores if theirs else None) if harness else []
    return EvaluationResult(
        model=mine.figures,
        baseline=theirs.figures if theirs else None,
        comparison=_compare(mine, theirs, text) if theirs else None,
        agreement=agreement(mine.predictions, theirs.predictions, text, mine.nll, theirs.nll) if theirs else None,
        tasks=tasks,
        tasks_mean=mean_accuracy(tasks),
        passkey=[
            retrieved(length, mine.retrievals, theirs.retrievals if theirs else None) for length in config.passkey
        ],
        ruler=ruler_results(mine.answers, theirs.answers if theirs else None),
        speed=_decode_speed(models, text, machine) if config.speed else None,
        data=data_name(config.data),
        windows=len(text.windows),
        sequence_length=config.sequence_length,
        stride=config.step,
        predictions=int(text.scored.sum()),
        protocol=nll_protocol(text, config.step, shuffled=config.seed is not None),
        cache_dtype=config.cache_dtype,
        cache_protocol=None if config.cache_dtype is None else described(config.cache_dtype),
        memory_formula=FORMULA if config.memory is not None else None,
        limit=config.limit,
        seed=config.seed,
        dtype=machine.dtype,
        tasks_path=[data_name(folder) for folder in config.tasks_path],
    )


def _open(names: list[str], config: EvalConfig, machine: Machine) -> list[_Model]:
    """The models' folders and tokenizers, after a check that their contexts are long enough for the windows."""
    folders = [open_folder(name, machine.trust_remote_code, any_family=True) for name in names]
    for folder in folders:
        check_context(folder.config, config.sequence_length)
        for length in config.passkey:
            check_context(folder.config, length, "--passkey")
        for length in config.ruler:
            check_context(folder.config, length, "--ruler")
    models = list[_Model]()
    for name, folder in zip(names, folders, strict=True):
        folder.weights.report()
        lack = None if config.memory is None else shortage(config.memory, folder.checkpoint.nbytes)
        if lack and not models:
            raise ConfigError(lack, where="--memory", fix="give the memory of one device that holds the whole model")
        if lack:
            logger.warning("%s: %s; nothing fits beside them", model_name(name), lack)
        tokenizer = load_tokenizer(folder.path, machine.trust_remote_code)
        beyond = unembedded_tokens(tokenizer, folder.config.get_text_config().vocab_size)
        models.append(_Model(model_name(name), folder, tokenizer, beyond))
    return models


def _read_text(models: list[_Model], config: EvalConfig) -> EvaluationText:
    """The windows, which must be the same for all models."""
    texts = [
        evaluation_text(
            read_documents(config.data, seed=config.seed, tokenizer=model.tokenizer, in_pieces=True),
            model.tokenizer,
            config.sequence_length,
            config.samples,
            config.step,
            config.data,
        )
        for model in models
    ]
    text = texts[0]
    for model in models:
        warn_of_unembedded(model.beyond, model.folder)
        check_tokens(text.windows, model.beyond, model.folder)
    if not torch.equal(text.windows, texts[-1].windows):
        raise ConfigError(
            "tokenises the text differently, so the figures per token cannot be compared",
            where=f"baseline {config.baseline}",
            fix="give a baseline with the model's own tokenizer, such as the source model",
        )
    if len(text.windows) < config.samples:
        logger.warning(
            "The text holds %d windows, fewer than the %d that were asked for.", len(text.windows), config.samples
        )
    return text


def _harness(models: list[_Model], config: EvalConfig) -> Harness:
    """The tasks; all models read prompts of one length, the smallest of their contexts."""
    limits = [model.context for model in models if model.context]
    harness = Harness(config.tasks, config.tasks_path, config.limit, min(limits, default=None))
    for model in models:
        harness.check(model.tokenizer)
    return harness


def _load(model: _Model, machine: Machine) -> PreTrainedModel:
    return load_model(
        model.folder, device=machine.device, dtype=machine.dtype, trust_remote_code=machine.trust_remote_code
    )


def _measure(
    model: _Model,
    text: EvaluationText,
    harness: Harness | None,
    questions: Sequence[Question],
    config: EvalConfig,
    machine: Machine,
    cache_dtype: CacheDtype | None,
) -> _Measured:
    """Load and measure a model; its memory is freed when this function returns."""
    loaded = _load(model, machine)
    caches = None if cache_dtype is None else QuantisedCaches(loaded, cache_dtype)
    guard_embeddings(loaded, model.beyond, model.folder)
    predictions = predict(loaded, text.windows)
    losses = token_nll(predictions, text.windows)
    retrievals = retrieve(loaded, model.tokenizer, config.passkey, config.passkey_trials, config.seed or 0)
    if not torch.isfinite(losses).all() or not all(math.isfinite(one.nll) for one in retrievals):
        narrow = loaded.dtype == torch.float16
        raise CheckpointError(
            f"the model's predictions are not finite{' in float16' * narrow}",
            where=model.folder,
            fix="compute with --dtype bfloat16 or float32" if narrow else "its weights are damaged",
        )
    return _Measured(
        figures=_figures(model, loaded, losses, text, config, caches),
        predictions=predictions,
        nll=losses,
        scores=harness.run(loaded, model.tokenizer) if harness else {},
        retrievals=retrievals,
        answers=answer(loaded, model.tokenizer, questions),
    )


def _figures(
    model: _Model, loaded: PreTrainedModel, losses: torch.Tensor, text: EvaluationText, config: EvalConfig,
    caches: QuantisedCaches | None,
) -> ModelFigures:  # fmt: skip
    nll = clustered_mean(losses, text.scored)
    assert nll is not None
    quantised = None if caches is None else (caches.dtype, caches.bytes_per_token())
    figures = model_figures(model.name, model.opened, loaded, nll, quantised)
    if config.memory is None:
        return figures
    return with_fit(figures, config.memory, config.sequence_length, model.context)


def _decode_speed(models: list[_Model], text: EvaluationText, machine: Machine) -> DecodeSpeed:
    mine, theirs = (_load(model, machine) for model in models)
    return decode_speed(mine, theirs, text.windows[:1])


def _compare(model: _Measured, baseline: _Measured, text: EvaluationText) -> Comparison:
    gap = clustered_mean(model.nll - baseline.nll, text.scored)
    assert gap is not None
    return compared(model.figures, baseline.figures, gap)
