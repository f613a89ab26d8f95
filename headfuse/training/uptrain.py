"""Recovery: train a fused model for a few tokens, by default towards the output distribution of its source."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from headfuse.checkpoint.folder import copy_companions, resolve_model
from headfuse.checkpoint.hub import folder_name, in_cache
from headfuse.checkpoint.output import check_output, output_folder, partial_folder
from headfuse.checkpoint.plan_file import read_plan, write_plan
from headfuse.checkpoint.reader import DTYPE_NAMES, fingerprint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.config.uptrain import UptrainConfig, load_recipe
from headfuse.errors import ConfigError, HeadfuseError
from headfuse.models.config import raw_config, read_config
from headfuse.models.loading import (
    check_context,
    guard_embeddings,
    load_model,
    load_tokenizer,
    unembedded_tokens,
    warn_of_unembedded,
)
from headfuse.models.weights import ModelWeights, untie
from headfuse.reporting.card import card_section, extended_card
from headfuse.text.documents import DEFAULT_DATA
from headfuse.text.stream import TrainingText
from headfuse.training.loop import Progress, make_accelerator, student_nll, train, weights_of
from headfuse.training.objective import LossWeights, Objective
from headfuse.training.optimizer import make_optimizer, prepare_training
from headfuse.training.run import Run
from headfuse.training.schedule import default_batch_size, default_learning_rate, num_steps
from headfuse.training.teacher import LiveTeacher, check_head, check_teacher, computing_dtype, find_teacher
from headfuse.training.teacher_cache import CachedTeacher

logger = logging.getLogger(__name__)
__all__ = ["Progress", "UptrainResult", "default_output", "uptrain"]
CONFIG = "uptrain.yaml"
"""The file beside the weights that reproduces a run."""


@dataclass(frozen=True)
class UptrainResult:
    """What `uptrain` did; the NLL figures are per token on held-out windows of the text, None where it is too short."""

    output: Path
    teacher: str | None
    data: str
    recipe: UptrainConfig
    processes: int
    steps: int
    best_step: int
    tokens: int
    epochs: int
    seconds: float
    tokens_per_second: float
    validation_windows: int
    nll_before: float | None
    nll_after: float | None
    nll_teacher: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "output": str(self.output), "recipe": self.recipe.named()}


def uptrain(
    model: str,
    *,
    data: str | Sequence[str] | Mapping[str, float] | None = None,
    tokens: int | str | None = None,
    config: str | None = None,
    teacher: str | None = None,
    teacher_device: str | None = None,
    teacher_dtype: str | None = None,
    teacher_cache: Path | None = None,
    loss: str | None = None,
    learning_rate: float | None = None,
    fused_learning_rate: float | None = None,
    weight_decay: float | None = None,
    batch_size: int | None = None,
    gradient_accumulation: int | None = None,
    sequence_length: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    seed: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    log_every: int = 1,
    checkpoint_every: int | None = None,
    trackers: Sequence[str] = (),
    tracker_folder: Path = Path("runs"),
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> UptrainResult:
    """Train a model in float32 and write it in the format that it has.

    Under `accelerate launch` every process calls this with the same arguments, and gets the same result.

    Args:
        model: the fused folder or hub id.
        data: the text, as `text.read_documents` takes it, or several with their shares of the tokens; sections of it
            are held out for the figures.
        tokens: how many tokens to train on.
        config: a YAML file, or the name of a packaged recipe, of which the other arguments win.
        teacher: the model to learn from; by default the source that the folder's plan.json names.
        teacher_device: where it computes; by default where the student does.
        teacher_dtype: in which dtype; by default float32 on a CPU, the stored one elsewhere.
        teacher_cache: a folder for what the teacher's head reads; the teacher is then not in memory while training.
        loss: `kl` or `ce`; this and the next are options of the recipe, see `recipe.Recipe`.
        learning_rate: the peak.
        fused_learning_rate: of key and value projections, as a multiple.
        weight_decay: of AdamW.
        batch_size: windows in a forward pass of one process.
        gradient_accumulation: forward passes in a step.
        sequence_length: tokens in a window.
        output: the folder to write; by default `<model>-uptrained`.
        overwrite: replace an existing output.
        resume: go on where an interrupted run with the same options was; an explicit learning rate may differ.
        seed: of the shuffling and of dropout.
        device: `auto`, `cpu`, `cuda` or `mps`.
        dtype: of the written weights; by default each tensor's own in `model`.
        threads: CPU threads.
        log_every: steps between two lines of train_log.jsonl.
        checkpoint_every: steps between two states, each with a validation.
        trackers: `tensorboard`, `wandb`.
        tracker_folder: where they write, in a folder named after the output.
        trust_remote_code: run code that comes with the models.
        on_progress: called after every step.
        **options: the other options of the recipe.

    Raises:
        HeadfuseError: for models, text, options or an output that cannot be used, and when the loss is not finite.
    """
    overrides = {
        "data": data, "tokens": tokens, "loss": loss, "learning_rate": learning_rate,
        "fused_learning_rate": fused_learning_rate, "weight_decay": weight_decay, "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation, "sequence_length": sequence_length, "seed": seed,
        "checkpoint_every": checkpoint_every, **options,
    }  # fmt: skip
    recipe = load_recipe(config, overrides)
    _check(dtype=dtype, teacher_dtype=teacher_dtype)
    if log_every < 1:
        raise ConfigError(f"log_every is {log_every}", fix="give 1 or more")
    if teacher_cache is not None and (recipe.hidden or recipe.layerwise):
        fix = "leave `hidden` and `layerwise` at 0, or leave the cache out"
        raise ConfigError(
            "holds the teacher's last states alone, not those of its layers", where="--teacher-cache", fix=fix
        )
    folder = resolve_model(model)
    output = output or default_output(folder)
    teacher_folder, teacher_name = find_teacher(folder, teacher) if recipe.distilled else (None, None)
    reads = [folder] if teacher_folder is None else [folder, teacher_folder]
    accelerator = make_accelerator(
        device, unused=recipe.layerwise > 0, trackers=trackers, tracker_folder=tracker_folder / output.name
    )
    main = accelerator.is_main_process
    if recipe.train == "lora" and accelerator.distributed_type == DistributedType.FSDP:
        fix = "train: attention, or leave FSDP out: adapters need little memory"
        raise ConfigError("adapters cannot be merged into sharded weights", where="train: lora", fix=fix)
    if main:
        check_output(output, overwrite=overwrite, resume=resume, reads=reads)
    student_config = read_config(folder, trust_remote_code)
    check_context(student_config, recipe.sequence_length)
    stored = ModelWeights.open(folder, student_config)
    if main:
        stored.report()
    if DEFAULT_DATA in recipe.data:
        logger.warning("the packaged text is short, generic prose; give --data of the kind that the model is used on")
    if threads is not None:
        torch.set_num_threads(threads)
    if recipe.batch_size is None:
        per_window = recipe.gradient_accumulation * recipe.sequence_length * accelerator.num_processes
        recipe = recipe.model_copy(update={"batch_size": default_batch_size(recipe.tokens, per_window)})
    _check_step(recipe, accelerator)

    with _shared_folder(accelerator, output, overwrite=overwrite, resume=resume, reads=reads) as making:
        inputs = {
            "model": fingerprint(folder), "teacher": teacher_name, "teacher_dtype": teacher_dtype,
            "processes": accelerator.num_processes,
        }  # fmt: skip
        run = Run(making, recipe, inputs, resume, main)
        tokenizer = load_tokenizer(folder, trust_remote_code)
        text = TrainingText(
            recipe.data, tokenizer, recipe.sequence_length, recipe.seed, recipe.validation_data,
            recipe.validation_windows,
        )  # fmt: skip
        student = _load_student(folder, accelerator, trust_remote_code)
        beyond = unembedded_tokens(tokenizer, student.get_input_embeddings().weight.shape[0])
        guard_embeddings(student, beyond, folder)
        if main:
            warn_of_unembedded(beyond, folder)
        if run.recipe.learning_rate is None:
            rate = default_learning_rate(student.num_parameters(), recipe.train)
            run.recipe = run.recipe.model_copy(update={"learning_rate": rate})
        eos = tokenizer.eos_token_id if recipe.packing == "separate" else None
        logger.info("documents in a window %s", "see each other" if eos is None else "do not see each other")
        source: LiveTeacher | CachedTeacher | None = None
        if teacher_folder is not None:
            layers = recipe.hidden > 0 or recipe.layerwise > 0
            check_teacher(teacher_folder, student, tokenizer, layers, trust_remote_code)
            load = partial(
                _load_teacher, teacher_folder, teacher_device or str(accelerator.device), teacher_dtype, beyond,
                trust_remote_code,
            )  # fmt: skip
            if teacher_cache is None:
                source = LiveTeacher(load(), accelerator.device, eos, layers)
            else:
                dtype_of_states = teacher_dtype or computing_dtype(
                    teacher_folder, teacher_device or accelerator.device.type
                )
                source = CachedTeacher(
                    teacher_cache,
                    teacher_folder,
                    dtype_of_states,
                    recipe,
                    text.validation,
                    accelerator.device,
                    trust_remote_code,
                )
                size = windows_per_step(run.recipe, accelerator)
                steps = num_steps(recipe.tokens, size * recipe.sequence_length)
                training = partial(_first_windows, text, size, steps)
                source.prepare(training, steps * size, load, accelerator, eos)

        merge = prepare_training(student, run.recipe)
        weights = LossWeights(float(recipe.loss == "kl"), recipe.cross_entropy + (recipe.loss == "ce"), recipe.hidden)
        objective = Objective(student, source.head if source is not None else None, weights)
        optimizer = make_optimizer(student, run.recipe, accelerator.distributed_type == DistributedType.FSDP)
        wrapped, seconds, trained = train(
            run, accelerator, objective, optimizer, source, text, eos=eos, log_every=log_every,
            trackers=_flat(run.recipe) if trackers else None, on_progress=on_progress,
        )  # fmt: skip
        merge()
        windows = text.validation
        nll_after = run.validations.get(run.best)
        if recipe.train == "lora":  # as it is written: merged
            nll_after = student_nll(accelerator, wrapped, windows)
        result = UptrainResult(
            output=output,
            teacher=teacher_name,
            data=recipe.data_name,
            recipe=run.recipe,
            processes=accelerator.num_processes,
            steps=run.step,
            best_step=run.best or run.step,
            tokens=run.step * windows_per_step(run.recipe, accelerator) * recipe.sequence_length,
            epochs=run.epochs,
            seconds=seconds,
            tokens_per_second=trained / seconds if seconds else 0.0,
            validation_windows=len(windows),
            nll_before=run.figures["nll_before"],
            nll_after=nll_after,
            nll_teacher=run.figures["nll_teacher"],
        )
        run.log("end", nll_after=result.nll_after, best_step=result.best_step, epochs=result.epochs)
        trained_weights = weights_of(accelerator, wrapped)
        if main:
            _write(making, stored, trained_weights, dtype, result, trust_remote_code)
    accelerator.wait_for_everyone()
    return result


def windows_per_step(recipe: UptrainConfig, accelerator: Accelerator) -> int:
    """Windows that one optimizer step reads, over all processes."""
    assert recipe.batch_size is not None
    return recipe.batch_size * recipe.gradient_accumulation * accelerator.num_processes


def _check_step(recipe: UptrainConfig, accelerator: Accelerator) -> None:
    """Refuse a step that no number of steps comes near `tokens` with: one slip in a figure would fill the memory."""
    step = windows_per_step(recipe, accelerator) * recipe.sequence_length
    if step > 2 * recipe.tokens:
        raise ConfigError(
            f"one step reads {step:,} tokens (batch_size {recipe.batch_size:,}, gradient_accumulation "
            f"{recipe.gradient_accumulation:,}, sequence_length {recipe.sequence_length:,}, processes "
            f"{accelerator.num_processes:,}), and `tokens` is {recipe.tokens:,}",
            where="batch_size",
            fix=f"give a smaller --batch-size, --gradient-accumulation or --sequence-length, or --tokens {step:,}",
        )


@contextlib.contextmanager
def _shared_folder(accelerator: Accelerator, output: Path, **options: Any) -> Iterator[Path]:
    """The folder in which the main process makes the output, and from which the others read states."""
    if accelerator.is_main_process:
        with output_folder(output, **options) as making:
            accelerator.wait_for_everyone()
            yield making
    else:
        accelerator.wait_for_everyone()
        yield partial_folder(output)


def _load_student(folder: Path, accelerator: Accelerator, trust_remote_code: bool) -> PreTrainedModel:
    # one that is to be sharded must not be whole on a device
    sharded = accelerator.distributed_type == DistributedType.FSDP
    device = "cpu" if sharded else str(accelerator.device)
    student = load_model(folder, device=device, dtype="float32", trust_remote_code=trust_remote_code)
    check_head(student, folder)
    return student


def _load_teacher(
    folder: Path, device: str, dtype: str | None, beyond: Mapping[int, str], trust_remote_code: bool
) -> PreTrainedModel:
    teacher = load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    guard_embeddings(teacher, beyond, folder)
    check_head(teacher, folder)
    return teacher


def _first_windows(text: TrainingText, size: int, batches: int) -> Iterator[torch.Tensor]:
    return (batch.windows for batch in islice(text.batches(size), batches))


def _flat(recipe: UptrainConfig) -> dict[str, Any]:
    """The recipe as trackers keep it."""
    options = recipe.named()
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in options.items()}


def default_output(folder: Path) -> Path:
    """`<model>-uptrained`: beside a local folder, in the working directory for one of the hub's cache."""
    if in_cache(folder):
        return Path.cwd() / f"{folder_name(folder).rsplit('/')[-1]}-uptrained"
    path = folder if folder.name not in ("", "..") else folder.resolve()
    return path.with_name(f"{path.name}-uptrained")


def _check(**dtypes: str | None) -> None:
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in DTYPE_NAMES:
            raise ConfigError(f"{name} is {dtype!r}", fix=f"give one of {', '.join(DTYPE_NAMES)}")


def _write(
    partial: Path,
    stored: ModelWeights,
    weights: Mapping[str, torch.Tensor],
    dtype: str | None,
    result: UptrainResult,
    trust_remote_code: bool,
) -> None:
    """Write the trained weights by the names and in the dtypes of the source, and what belongs beside them."""
    layout, forced = stored.checkpoint, DTYPE_NAMES[dtype] if dtype else None
    source = layout.folder
    names = {name if name in weights else layout.stored_names[name]: name for name in layout.shapes}
    tensors = {written: (forced or layout.dtypes[name], layout.shapes[name]) for written, name in names.items()}
    writer = SafetensorsWriter(partial, tensors)
    for name, (kind, _) in tensors.items():
        tensor = weights[name].to("cpu", kind)
        if not torch.isfinite(tensor).all():
            raise HeadfuseError(f"{name} is beyond the range of {kind}", fix="write another --dtype, such as bfloat16")
        writer.write(name, tensor)
    config = raw_config(source)
    config = untie(config) if stored.untied else config
    if dtype is not None:
        config["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_companions(source, partial, trust_remote_code)
    if (source / "headfuse.yaml").exists():
        shutil.copyfile(source / "headfuse.yaml", partial / "headfuse.yaml")
    (partial / CONFIG).write_text(
        f"# headfuse uptrain --config {CONFIG} MODEL\n{result.recipe.to_yaml()}", encoding="utf-8"
    )
    card = extended_card(source, result.output.name, card_section(result))
    (partial / "README.md").write_text(card, encoding="utf-8")
    if (source / "plan.json").exists():
        write_plan(partial, read_plan(source))
