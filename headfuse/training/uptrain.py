"""Recovery: train a fused model for a few tokens, by default towards the output distribution of its source."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from headfuse.checkpoint.output_checks import check_output
from headfuse.config.command import UPTRAIN
from headfuse.config.machine import TrainingMachine
from headfuse.config.uptrain import UptrainConfig
from headfuse.errors import ConfigError
from headfuse.layouts.folder import ModelFolder, open_folder
from headfuse.models.loading import (
    check_context,
    guard_embeddings,
    load_model,
    load_tokenizer,
    unembedded_tokens,
    warn_of_unembedded,
)
from headfuse.plan import FusionPlan
from headfuse.text.documents import DEFAULT_DATA
from headfuse.text.stream import TrainingText
from headfuse.training.accelerator import make_accelerator, shard_layers, weights_of
from headfuse.training.footprint import footprint, peak_flops, report
from headfuse.training.loop import Monitor, Progress, TrainingLoop
from headfuse.training.objective import LossWeights, Objective
from headfuse.training.optimizer import make_optimizer, prepare_training
from headfuse.training.output import default_output, shared_folder, write_trained
from headfuse.training.result import UptrainResult
from headfuse.training.run import Run
from headfuse.training.schedule import default_learning_rate, divide, windows_per_step, with_batch_size
from headfuse.training.teacher import (
    LiveTeacher,
    check_head,
    check_separation,
    check_teacher,
    computing_dtype,
    find_teacher,
    load_teacher,
)
from headfuse.training.teacher_cache import CachedTeacher
from headfuse.training.validation import student_nll

logger = logging.getLogger(__name__)
__all__ = ["Progress", "UptrainResult", "default_output", "uptrain"]


@dataclass(frozen=True)
class _Job:
    """A checked run: what it reads, where it writes, and how."""

    model: ModelFolder
    plan: FusionPlan | None
    """Copied to the output; read here so that a damaged file is refused before the training."""
    teacher: Path | None
    teacher_name: str | None
    teacher_fingerprint: str | None
    output: Path
    config: UptrainConfig
    machine: TrainingMachine
    accelerator: Accelerator

    @property
    def folder(self) -> Path:
        return self.model.path

    @property
    def reads(self) -> list[Path]:
        return [self.folder] if self.teacher is None else [self.folder, self.teacher]

    @property
    def sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP


def uptrain(
    model: str | Path,
    config: UptrainConfig | str | Path | None = None,
    *,
    teacher: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> UptrainResult:
    """Train a model in float32 and write it in the format that it has.

    Under `accelerate launch` every process calls this with the same arguments, and gets the same result.

    Args:
        model: the fused folder or hub id.
        config: an `UptrainConfig`, a YAML file or the name of a packaged recipe.
        teacher: the model to learn from; by default the source that the folder's plan.json names.
        output: the folder to write; by default `<model>-uptrained`.
        overwrite: replace an existing output.
        resume: go on where an interrupted run with the same options was; an explicit learning rate may differ.
        on_progress: called after every step.
        **options: those of `UptrainConfig`, which win over `config` (`data` and `tokens` have no default), and of
            `TrainingMachine`, by name.

    Raises:
        HeadfuseError: for models, text, options or an output that cannot be used, and when the loss is not finite.
    """
    recipe, machine = UPTRAIN.read(config, options)
    job = _check(str(model), recipe, machine, teacher, None if output is None else Path(output))
    if job.accelerator.is_main_process:
        check_output(job.output, overwrite=overwrite, resume=resume, reads=job.reads)
    if DEFAULT_DATA in job.config.data:
        logger.warning("Training on bundled prose and code, which is short. Pass --data with text like your inputs.")
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    with shared_folder(job.accelerator, job.output, overwrite=overwrite, resume=resume, reads=job.reads) as making:
        inputs = {
            "model": job.model.checkpoint.fingerprint(), "teacher": job.teacher_name,
            "teacher_weights": job.teacher_fingerprint,
            "teacher_dtype": machine.teacher_dtype, "compute_dtype": machine.compute_dtype,
            "processes": job.accelerator.num_processes,
        }  # fmt: skip
        run = Run(making, job.config, inputs, resume, job.accelerator.is_main_process)
        result, weights = _train(job, run, on_progress)
        if job.accelerator.is_main_process:
            write_trained(making, job.model, job.plan, weights, result, machine)
    job.accelerator.wait_for_everyone()
    return result


def _check(
    model: str, config: UptrainConfig, machine: TrainingMachine, teacher: str | None, output: Path | None
) -> _Job:
    """Refuse what cannot be trained, before anything is loaded or written."""
    if machine.teacher_cache is not None and (config.hidden or config.layerwise):
        fix = "leave `hidden` and `layerwise` at 0, or leave the cache out"
        raise ConfigError(
            "holds only the teacher's last hidden states, not those of its layers", where="--teacher-cache", fix=fix
        )
    folder = open_folder(model, machine.trust_remote_code)
    output = output or default_output(folder.path)
    found, name, content = find_teacher(folder.path, teacher) if config.distilled else (None, None, None)
    accelerator = make_accelerator(
        machine.device,
        unused=config.layerwise > 0,
        compute_dtype=machine.compute_dtype,
        trackers=machine.trackers,
        tracker_folder=machine.tracker_folder / output.name,
    )
    if config.train == "lora" and accelerator.distributed_type == DistributedType.FSDP:
        fix = "train: attention, or leave FSDP out: adapters need little memory"
        raise ConfigError("adapters cannot be merged into sharded weights", where="train: lora", fix=fix)
    check_context(folder.config, config.sequence_length)
    if accelerator.is_main_process:
        folder.weights.report()
    _check_step(with_batch_size(config, accelerator.num_processes), accelerator)
    return _Job(folder, folder.plan, found, name, content, output, config, machine, accelerator)


def _check_step(recipe: UptrainConfig, accelerator: Accelerator) -> None:
    """Refuse a step much larger than `tokens`: one mistyped number would fill the memory."""
    step = windows_per_step(recipe, accelerator.num_processes) * recipe.sequence_length
    if step > 2 * recipe.tokens:
        raise ConfigError(
            f"one step reads {step:,} tokens (batch_size {recipe.batch_size:,}, gradient_accumulation "
            f"{recipe.gradient_accumulation:,}, sequence_length {recipe.sequence_length:,}, processes "
            f"{accelerator.num_processes:,}), and `tokens` is {recipe.tokens:,}",
            where="batch_size",
            fix=f"give a smaller --batch-size, --gradient-accumulation or --sequence-length, or --tokens {step:,}",
        )


def _train(
    job: _Job, run: Run, on_progress: Callable[[Progress], None] | None
) -> tuple[UptrainResult, dict[str, torch.Tensor]]:
    """Load and train the model; return the result and the trained weights."""
    machine, accelerator = job.machine, job.accelerator
    tokenizer = load_tokenizer(job.folder, machine.trust_remote_code)
    text = TrainingText(
        run.recipe.data, tokenizer, run.recipe.sequence_length, run.recipe.seed, run.recipe.validation_data,
        run.recipe.validation_windows, whole=run.recipe.packing == "separate",
    )  # fmt: skip
    student = _load_student(job)
    beyond = unembedded_tokens(tokenizer, student.get_input_embeddings().weight.shape[0])
    guard_embeddings(student, beyond, job.folder)
    if accelerator.is_main_process:
        warn_of_unembedded(beyond, job.folder)
    if run.recipe.learning_rate is None:
        rate = default_learning_rate(student.num_parameters(), run.recipe.train)
        run.recipe = run.recipe.model_copy(update={"learning_rate": rate})
    recipe = run.recipe
    eos = tokenizer.eos_token_id if recipe.packing == "separate" else None
    if eos is not None:
        check_separation(student, job.folder)
    logger.info("documents in a window %s", "see each other" if eos is None else "do not see each other")
    teacher = _make_teacher(job, recipe, student, tokenizer, text, eos)

    merge = prepare_training(student, recipe)
    weights = LossWeights(float(recipe.loss == "kl"), recipe.cross_entropy + (recipe.loss == "ce"), recipe.hidden)
    objective = Objective(student, teacher.head if teacher is not None else None, weights)
    optimizer = make_optimizer(student, recipe, job.sharded)
    loop = TrainingLoop(run, accelerator, objective, optimizer, teacher, text, eos)
    trackers = _flat(recipe) if machine.trackers else None
    monitor = Monitor(machine.log_every, trackers, on_progress, _seconds_at_peak(job, recipe, student, teacher))
    wrapped, seconds, trained = loop.train(monitor)
    merge()
    nll_after = run.validations.get(run.best)
    if recipe.train == "lora":  # as it is written: merged
        nll_after = student_nll(accelerator, wrapped, text.validation, eos)
    result = UptrainResult(
        output=job.output,
        teacher=job.teacher_name,
        data=recipe.data_name,
        recipe=recipe,
        processes=accelerator.num_processes,
        steps=run.step,
        best_step=run.best or run.step,
        tokens=run.step * loop.steps.tokens,
        epochs=run.epochs,
        seconds=seconds,
        tokens_per_second=trained / seconds if seconds else 0.0,
        validation_windows=len(text.validation),
        nll_before=run.figures["nll_before"],
        nll_after=nll_after,
        nll_teacher=run.figures["nll_teacher"],
    )
    run.log("end", nll_after=result.nll_after, best_step=result.best_step, epochs=result.epochs)
    return result, weights_of(accelerator, wrapped)


def _seconds_at_peak(
    job: _Job, recipe: UptrainConfig, student: PreTrainedModel, teacher: LiveTeacher | CachedTeacher | None
) -> float | None:
    """Log the memory of the run; return the seconds that a token takes where all devices reach their peak, if known."""
    accelerator, here = job.accelerator, job.machine.teacher_device is None
    beside = teacher.model if isinstance(teacher, LiveTeacher) and here else None
    shards = accelerator.num_processes if job.sharded else 1
    counted = footprint(student, beside, recipe, shards, accelerator.mixed_precision == "bf16")
    if accelerator.is_main_process:
        report(counted, accelerator.device)
    peak = peak_flops(accelerator.device)
    return None if peak is None or counted.flops is None else counted.flops / (peak * accelerator.num_processes)


def _load_student(job: _Job) -> PreTrainedModel:
    # one that is to be sharded must not be whole on a device
    device = "cpu" if job.sharded else str(job.accelerator.device)
    stored = job.config.train != "all" and not job.sharded and job.accelerator.mixed_precision == "bf16"
    dtype = None if stored else "float32"  # what is frozen stays as it is stored, see prepare_training
    student = load_model(job.folder, device=device, dtype=dtype, trust_remote_code=job.machine.trust_remote_code)
    check_head(student, job.folder)
    return student


def _make_teacher(
    job: _Job, recipe: UptrainConfig, student: PreTrainedModel, tokenizer: Any, text: TrainingText, eos: int | None
) -> LiveTeacher | CachedTeacher | None:
    """The teacher that the loss needs: in memory, or as cached states, computed now if they are missing."""
    folder, content, machine, accelerator = job.teacher, job.teacher_fingerprint, job.machine, job.accelerator
    if folder is None or content is None:
        return None
    layers = recipe.hidden > 0 or recipe.layerwise > 0
    check_teacher(folder, student, tokenizer, layers, machine.trust_remote_code)
    spread = job.sharded and machine.teacher_device is None and machine.teacher_cache is None
    device = "cpu" if spread else machine.teacher_device or str(accelerator.device)
    chosen = machine.teacher_dtype or machine.compute_dtype
    kept = chosen or computing_dtype(folder, machine.teacher_device or accelerator.device.type)
    dtype = kept if spread else chosen
    beyond = unembedded_tokens(tokenizer, student.get_input_embeddings().weight.shape[0])
    load = partial(load_teacher, folder, device, dtype, beyond, machine.trust_remote_code)
    if machine.teacher_cache is None:
        model = load()
        if spread:
            shard_layers(model, accelerator)
        return LiveTeacher(model, accelerator.device, eos, layers)
    trusted, here = machine.trust_remote_code, accelerator.device
    cached = CachedTeacher(machine.teacher_cache, folder, content, kept, recipe, text.validation, here, trusted)
    steps = divide(recipe, accelerator.num_processes, len(text.validation))
    training = partial(_first_windows, text, steps.windows, steps.number)
    cached.prepare(training, steps.number * steps.windows, load, accelerator, eos)
    return cached


def _first_windows(text: TrainingText, size: int, batches: int) -> Iterator[torch.Tensor]:
    return (batch.windows for batch in islice(text.batches(size), batches))


def _flat(recipe: UptrainConfig) -> dict[str, Any]:
    """The recipe in the form that trackers store."""
    return {n: v if isinstance(v, (int, float, str)) else str(v) for n, v in recipe.named().items()}
