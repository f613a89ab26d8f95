"""Recovery: train a fused model for a few tokens, by default towards the output distribution of its source."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.checkpoint import (
    DTYPE_NAMES,
    RESUME,
    STATE,
    Checkpoint,
    SafetensorsWriter,
    check_output,
    copy_companions,
    fingerprint,
    output_folder,
    read_config,
    read_plan,
    read_resume,
    resolve_model,
    write_plan,
    write_resume,
)
from headfuse.distillation import Objective, last_hidden_state
from headfuse.errors import CheckpointError, ConfigError, HeadfuseError, OutputError, UnsupportedModelError
from headfuse.evaluate import check_context, check_vocabulary, model_name, nll_per_window
from headfuse.loading import load_model, load_tokenizer, pick_device
from headfuse.text import DEFAULT_DATA, TrainingText, data_name

logger = logging.getLogger(__name__)

Loss = Literal["kl", "ce"]

LOG = "train_log.jsonl"
LEARNING_RATES = ((50e6, 5e-4), (1e9, 1e-4), (math.inf, 2e-5))
"""Default peak learning rates: (below so many parameters, rate). The first was measured on a model of 6 M."""

_FUSED = (".k_proj.", ".v_proj.")


@dataclass(frozen=True)
class Recipe:
    """Everything but model, teacher and text that decides the trained weights."""

    tokens: int
    loss: Loss = "kl"
    learning_rate: float | None = None
    warmup: float = 0.03
    final_learning_rate: float = 0.1
    fused_learning_rate: float = 2.0
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    sequence_length: int = 512
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.gradient_accumulation * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps: the number whose tokens come nearest to `tokens`, at least one."""
        return max(1, round(self.tokens / self.tokens_per_step))


@dataclass(frozen=True)
class Progress:
    """Where a run is after a step."""

    step: int
    steps: int
    tokens: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class UptrainResult:
    """What `uptrain` did; the NLL figures are per token on held-out windows of the text, None where it is too short."""

    output: Path
    teacher: str | None
    data: str
    recipe: Recipe
    steps: int
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
        return {**asdict(self), "output": str(self.output)}


def uptrain(
    model: str,
    *,
    data: str,
    tokens: int,
    teacher: str | None = None,
    loss: Loss = "kl",
    learning_rate: float | None = None,
    fused_learning_rate: float = 2.0,
    weight_decay: float = 0.0,
    batch_size: int | None = None,
    gradient_accumulation: int = 1,
    sequence_length: int = 512,
    output: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    log_every: int = 1,
    checkpoint_every: int | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> UptrainResult:
    """Train all weights of a model in float32 and write it in the format that it has.

    Args:
        model: the fused folder or hub id.
        data: the text, as `text.read_documents` takes it; sections of it are held out for the figures.
        tokens: how many tokens to train on; the text is read again, shuffled anew, where it ends before.
        teacher: the model to learn from; by default the source that the folder's plan.json names.
        loss: `kl`, the divergence from the teacher over the full vocabulary at every token, or `ce`, cross-entropy.
        learning_rate: the peak; by default 5e-4 below 50 million parameters, 1e-4 below a billion, else 2e-5.
        fused_learning_rate: the learning rate of key and value projections, as a multiple (2 in mha2gqa).
        weight_decay: of AdamW.
        batch_size: windows in a forward pass; by default 8, fewer where the tokens would not give 500 steps.
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
        checkpoint_every: steps between two checkpoints; by default a tenth of the run, at least 10.
        trust_remote_code: run code that comes with the models.
        on_progress: called after every step.

    Raises:
        HeadfuseError: for models, text, options or an output that cannot be used, and when the loss is not finite.
    """
    recipe = Recipe(
        tokens=tokens,
        loss=loss,
        learning_rate=learning_rate,
        fused_learning_rate=fused_learning_rate,
        weight_decay=weight_decay,
        batch_size=default_batch_size(tokens, gradient_accumulation * sequence_length)
        if batch_size is None
        else batch_size,
        gradient_accumulation=gradient_accumulation,
        sequence_length=sequence_length,
        seed=seed,
    )
    _check(recipe, dtype, log_every=log_every, checkpoint_every=checkpoint_every, threads=threads)
    folder, output = resolve_model(model), output or default_output(model)
    teacher_folder, teacher_name = _find_teacher(folder, teacher) if loss == "kl" else (None, None)
    reads = [folder] if teacher_folder is None else [folder, teacher_folder]
    check_output(output, overwrite=overwrite, resume=resume, reads=reads)
    check_context(read_config(folder, trust_remote_code), sequence_length)
    if data == DEFAULT_DATA:
        logger.warning("the packaged text is short, generic prose; give --data of the kind that the model is used on")
    if threads is not None:
        torch.set_num_threads(threads)

    with output_folder(output, overwrite=overwrite, resume=resume, reads=reads) as partial:
        inputs = {"model": fingerprint(folder), "teacher": teacher_name, "data": data_name(data)}
        run = _Run(partial, recipe, inputs, resume)
        tokenizer = load_tokenizer(folder, trust_remote_code)
        text = TrainingText(data, tokenizer, sequence_length, seed)
        student = load_model(folder, device=device, dtype="float32", trust_remote_code=trust_remote_code)
        check_vocabulary(student, tokenizer, folder)
        _check_tensors(student, folder)
        _check_head(student, folder)
        source = None
        if teacher_folder is not None:
            source = load_model(teacher_folder, device=device, trust_remote_code=trust_remote_code)
            source.requires_grad_(False)
            _check_teacher(
                source, student, load_tokenizer(teacher_folder, trust_remote_code), tokenizer, teacher_folder
            )

        if run.recipe.learning_rate is None:
            run.recipe = replace(run.recipe, learning_rate=default_learning_rate(student.num_parameters()))
        if not run.figures:
            run.figures = {"nll_before": _nll(student, text.validation), "nll_teacher": _nll(source, text.validation)}
        seconds, trained = _train(run, student, source, text, device, log_every, checkpoint_every, on_progress)
        result = UptrainResult(
            output=output,
            teacher=teacher_name,
            data=data_name(data),
            recipe=run.recipe,
            steps=recipe.steps,
            tokens=recipe.steps * recipe.tokens_per_step,
            epochs=run.epochs,
            seconds=seconds,
            tokens_per_second=trained / seconds if seconds else 0.0,
            validation_windows=len(text.validation),
            nll_before=run.figures["nll_before"],
            nll_after=_nll(student, text.validation),
            nll_teacher=run.figures["nll_teacher"],
        )
        run.log("end", nll_after=result.nll_after, epochs=result.epochs)
        _write(partial, folder, student, dtype, result)
    return result


# ---------------------------------------------------------------- the mathematics


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """The learning rate of a step, counted from 0, relative to the peak: linear warm-up, then a cosine."""
    warmup = math.ceil(recipe.warmup * recipe.steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - 1 - warmup)
    return recipe.final_learning_rate + (1 - recipe.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


def default_learning_rate(parameters: float) -> float:
    """The peak learning rate for a model of so many parameters."""
    return next(rate for limit, rate in LEARNING_RATES if parameters < limit)


def default_batch_size(tokens: int, tokens_per_window: int) -> int:
    """Windows in a batch: 8, or fewer to take 500 steps; with few tokens, more steps recover more."""
    return max(1, min(8, tokens // (500 * max(1, tokens_per_window))))


# ---------------------------------------------------------------- the run


def _nll(model: PreTrainedModel | None, windows: torch.Tensor) -> float | None:
    return nll_per_window(model, windows).mean().item() if model is not None and len(windows) else None


class _Run:
    """An output in the making: its log, and the state from which an interrupted run goes on.

    A state is a folder `state/step-N` that gets its name when it is complete; resume.json, replaced in one step, says
    which one counts.
    """

    def __init__(self, folder: Path, recipe: Recipe, inputs: dict[str, Any], resume: bool) -> None:
        self.folder, self.recipe, self.inputs = folder, recipe, inputs
        self.step, self.epochs, self.figures = 0, 0, dict[str, float | None]()
        saved = read_resume(folder, "uptrain") if resume else None
        if saved is None:
            shutil.rmtree(folder / STATE, ignore_errors=True)
            (folder / RESUME).unlink(missing_ok=True)
        else:
            self._go_on(saved)
        self._keep_log()

    def _go_on(self, saved: dict[str, Any]) -> None:
        now, before = {**asdict(self.recipe), **self.inputs}, {**saved["recipe"], **saved["inputs"]}
        rate, saved_rate = now.pop("learning_rate"), before.pop("learning_rate")
        changed = [f"{name} (was {before.get(name)}, is {now[name]})" for name in now if now[name] != before.get(name)]
        if changed:
            raise ConfigError(
                f"the interrupted run had other options: {', '.join(changed)}",
                where=self.folder,
                fix="resume with the same options, or start anew with --overwrite",
            )
        if rate not in (None, saved_rate):
            logger.warning("going on with learning rate %g instead of %g", rate, saved_rate)
        self.recipe = replace(self.recipe, learning_rate=rate or saved_rate)
        self.step, self.epochs, self.figures = saved["step"], saved["epochs"], saved["figures"]

    def load(self, accelerator: Accelerator) -> None:
        """Restore model, optimizer and random numbers, when there is a state."""
        if self.step:
            accelerator.load_state(str(self._state(self.step)))

    def save(self, accelerator: Accelerator, step: int, epochs: int) -> None:
        """Write the state after `step` steps; the last one stays until this one is complete."""
        new, path = self.folder / STATE / "new", self._state(step)
        try:
            shutil.rmtree(new, ignore_errors=True)
            accelerator.save_state(str(new), safe_serialization=False)  # keeps tied weights
            for file in new.iterdir():
                _sync(file)
        except RuntimeError as error:  # how torch.save reports a full disk
            shutil.rmtree(new, ignore_errors=True)
            reason = f"the checkpoint after step {step} cannot be written: {error}"
            raise OutputError(reason, where=self.folder, fix="free some space, then go on with --resume") from None
        shutil.rmtree(path, ignore_errors=True)
        new.rename(path)
        self.step, self.epochs = step, epochs
        names = ("step", "epochs", "inputs", "figures")
        saved = {"recipe": asdict(self.recipe), **{name: getattr(self, name) for name in names}}
        write_resume(self.folder, "uptrain", saved)
        for old in (self.folder / STATE).glob("step-*"):
            if old != path:
                shutil.rmtree(old)

    def _state(self, step: int) -> Path:
        return self.folder / STATE / f"step-{step:07d}"

    def log(self, event: str, **values: Any) -> None:
        """Add a line to the log."""
        with (self.folder / LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": event, **values}) + "\n")

    def _keep_log(self) -> None:
        """Drop the lines of steps that the state does not hold."""
        path, kept = self.folder / LOG, []
        if self.step and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    if record["event"] == "start" or record.get("step", self.step + 1) <= self.step:
                        kept.append(line)
        path.write_text("".join(kept), encoding="utf-8")


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _train(
    run: _Run,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    text: TrainingText,
    device: str,
    log_every: int,
    checkpoint_every: int | None,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[float, int]:
    """Take the steps that are left; returns their seconds and tokens."""
    recipe, start = run.recipe, run.step
    peak = recipe.learning_rate
    assert peak is not None  # settled by the caller
    checkpoint_every = checkpoint_every or max(10, recipe.steps // 10)
    set_seed(recipe.seed)
    accelerator = _accelerator(device, recipe)
    objective, optimizer = accelerator.prepare(Objective(student), _optimizer(student, recipe))
    run.load(accelerator)
    if not start:
        run.log("start", recipe=asdict(recipe), **run.inputs, steps=recipe.steps, **run.figures)

    windows = islice(text.windows(), start * recipe.batch_size * recipe.gradient_accumulation, None)
    student.train()
    began = time.monotonic()
    for step in range(start + 1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = peak * group["factor"] * learning_rate_at(step - 1, recipe)
        total = 0.0
        for _ in range(recipe.gradient_accumulation):
            with accelerator.accumulate(objective):
                batch = torch.stack(list(islice(windows, recipe.batch_size))).to(accelerator.device)
                loss = objective(batch, teacher)
                accelerator.backward(loss)
                total += loss.item() / recipe.gradient_accumulation
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(objective.parameters(), recipe.gradient_clip).item()
                    _check_finite(run, step, total, norm)
                optimizer.step()
                optimizer.zero_grad()
        seconds = time.monotonic() - began
        progress = Progress(
            step=step,
            steps=recipe.steps,
            tokens=step * recipe.tokens_per_step,
            loss=total,
            learning_rate=peak * learning_rate_at(step - 1, recipe),
            tokens_per_second=(step - start) * recipe.tokens_per_step / seconds,
            seconds_left=seconds / (step - start) * (recipe.steps - step),
        )
        if step % log_every == 0 or step == recipe.steps:
            figures = {name: value for name, value in asdict(progress).items() if name not in ("steps", "seconds_left")}
            run.log("step", **figures, gradient_norm=norm)
        if step % checkpoint_every == 0 or step == recipe.steps:
            run.save(accelerator, step, text.epochs)
            logger.info("step %d of %d: loss %.4f, state saved", step, recipe.steps, total)
        if on_progress is not None:
            on_progress(progress)
    student.eval()
    return time.monotonic() - began, (recipe.steps - start) * recipe.tokens_per_step


def _accelerator(device: str, recipe: Recipe) -> Accelerator:
    target = pick_device(device)
    bfloat16 = target.type == "cuda" and torch.cuda.is_bf16_supported()
    return Accelerator(
        cpu=target.type == "cpu",
        mixed_precision="bf16" if bfloat16 else "no",
        gradient_accumulation_steps=recipe.gradient_accumulation,
    )


def _optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over all weights; key and value projections in a group of their own."""
    named = list(model.named_parameters())
    fused = [parameter for name, parameter in named if any(part in name for part in _FUSED)]
    others = [parameter for name, parameter in named if not any(part in name for part in _FUSED)]
    groups = [{"params": others, "factor": 1.0}, {"params": fused, "factor": recipe.fused_learning_rate}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)


def _check_finite(run: _Run, step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = f"the state after step {run.step} is kept" if run.step else "nothing was kept"
    raise HeadfuseError(
        f"the loss is {loss}, the norm of its gradient {norm}, at step {step}; {kept}",
        where=run.folder,
        fix="give a lower --learning-rate" + (", with --resume to go on from there" if run.step else ""),
    )


# ---------------------------------------------------------------- inputs and output


def default_output(model: str) -> Path:
    """`<model>-uptrained`: beside a local folder, in the working directory for a hub id."""
    path = Path(model)
    if not path.is_dir():
        return Path(f"{path.name}-uptrained")
    path = path if path.name not in ("", "..") else path.resolve()
    return path.with_name(f"{path.name}-uptrained")


def _check(recipe: Recipe, dtype: str | None, **counts: int | None) -> None:
    """Raise ConfigError for the first option that no run can have."""
    for name in ("tokens", "batch_size", "gradient_accumulation", "sequence_length"):
        counts[name] = getattr(recipe, name)
    for name, value in counts.items():
        least = 2 if name == "sequence_length" else 1
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}", fix=f"give {least} or more")
    rates = {"learning_rate": recipe.learning_rate, "fused_learning_rate": recipe.fused_learning_rate}
    for name, rate in rates.items():
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"{name} is {rate}", fix="give a number above 0, such as 1e-4")
    if not 0 <= recipe.weight_decay < math.inf:
        raise ConfigError(f"weight_decay is {recipe.weight_decay}", fix="give 0 or more")
    if recipe.loss not in get_args(Loss):
        raise ConfigError(f"loss is {recipe.loss!r}", fix=f"give one of {', '.join(get_args(Loss))}")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ConfigError(f"dtype is {dtype!r}", fix=f"give one of {', '.join(DTYPE_NAMES)}")


def _find_teacher(folder: Path, teacher: str | None) -> tuple[Path, str]:
    """The teacher's folder and name: what was asked for, else the source of the plan, known by its content."""
    if teacher is not None:
        return resolve_model(teacher), model_name(teacher)
    if not (folder / "plan.json").exists():
        fix = "give the source model with --teacher, or train without one with --loss ce"
        raise ConfigError("has no plan.json that names its source", where=folder, fix=fix)
    source = read_plan(folder).source
    short = source.name.rsplit("/", 1)[-1]
    tried = []
    for candidate in dict.fromkeys((folder.resolve().parent / short, Path(short), Path(source.name))):
        if (candidate / "config.json").is_file():
            if fingerprint(candidate) == source.fingerprint:
                return candidate, source.name
            tried.append(f"{candidate} is another model")
    if "/" in source.name:
        try:
            candidate = resolve_model(source.name, source.revision)
            if fingerprint(candidate) == source.fingerprint:
                return candidate, source.name
            tried.append(f"{source.name} on the hub is another model")
        except CheckpointError as error:
            tried.append(error.what)
    reason = "; ".join(tried) or "no such folder beside it or in the working directory"
    raise ConfigError(
        f"its source {source.name}, the teacher, was not found ({reason})",
        where=folder,
        fix="give the source model with --teacher, or train without one with --loss ce",
    )


def _check_teacher(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    fix = "give the model that this one was fused from"
    if teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError("the teacher has another tokenizer", where=folder, fix=fix)
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the teacher predicts {sizes[0]} tokens, the model {sizes[1]}", where=folder, fix=fix)
    _check_head(teacher, folder)


def _check_tensors(model: PreTrainedModel, folder: Path) -> None:
    """Every stored tensor must be one that is trained, or the output could not hold it."""
    missing = sorted(set(Checkpoint(folder).shapes) - set(model.state_dict()))
    if missing:
        raise CheckpointError(
            f"holds a tensor that the model does not have: {missing[0]}",
            where=folder,
            fix="restore the weights of that model",
        )


@torch.no_grad()
def _check_head(model: PreTrainedModel, folder: Path) -> None:
    """The loss reads logits as `output embeddings (last hidden state)`: refuse a model that scales or caps them."""
    batch = torch.arange(4, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    if not torch.allclose(
        model(batch).logits, model.get_output_embeddings()(last_hidden_state(model, batch)), rtol=1e-3
    ):
        raise UnsupportedModelError(
            "scales or caps its logits, which uptrain does not support", where=folder, fix="choose another model"
        )


def _write(partial: Path, source: Path, model: PreTrainedModel, dtype: str | None, result: UptrainResult) -> None:
    """Write the trained weights with names and files as in `source`, and what belongs beside them."""
    layout, weights = Checkpoint(source), model.state_dict()
    forced = DTYPE_NAMES[dtype] if dtype else None
    tensors = {name: (forced or layout.dtypes[name], shape) for name, shape in layout.shapes.items()}
    writer = SafetensorsWriter(partial, tensors)
    for name, (kind, _) in tensors.items():
        tensor = weights[name].to("cpu", kind)
        if not torch.isfinite(tensor).all():
            raise HeadfuseError(f"{name} is beyond the range of {kind}", fix="write another --dtype, such as bfloat16")
        writer.write(name, tensor)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_companions(source, partial)
    if (source / "headfuse.yaml").exists():
        shutil.copyfile(source / "headfuse.yaml", partial / "headfuse.yaml")
    card = source / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {result.output.name}\n"
    (partial / "README.md").write_text(f"{text.rstrip()}\n\n{card_section(result)}", encoding="utf-8")
    if (source / "plan.json").exists():
        write_plan(partial, read_plan(source))


def card_section(result: UptrainResult) -> str:
    """What the model card says about the training."""
    recipe, teacher = result.recipe, f" from `{result.teacher}`" if result.teacher else ""
    losses = {"kl": f"forward KL divergence{teacher} over the full vocabulary", "ce": "cross-entropy"}
    windows = f"{result.validation_windows} held-out windows of {recipe.sequence_length} tokens of the text"
    figures = {"source": result.nll_teacher, "before": result.nll_before, "after": result.nll_after}
    rows = "".join(f"| {name} | {nll:.3f} |\n" for name, nll in figures.items() if nll is not None)
    return (
        "## Uptraining\n\n"
        f"All weights were trained in float32 on {result.tokens:,} tokens of `{result.data}` by `headfuse uptrain`:"
        f" {losses[recipe.loss]}, AdamW (betas 0.9 and 0.95, weight decay {recipe.weight_decay:g}), {result.steps}"
        f" steps of {recipe.batch_size * recipe.gradient_accumulation} x {recipe.sequence_length} tokens, peak learning"
        f" rate {recipe.learning_rate:g} ({recipe.fused_learning_rate:g} times that for key and value projections),"
        f" {recipe.warmup:.0%} warm-up, cosine to {recipe.final_learning_rate:.0%},"
        f" gradient norm at most {recipe.gradient_clip:g}, seed {recipe.seed}.\n"
        + (f"\nNLL per token on {windows}:\n\n| model | NLL |\n|---|---|\n{rows}" if rows else "")
    )
