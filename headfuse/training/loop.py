"""The training loop on accelerate: steps, validations, states from which an interrupted run goes on exactly."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, set_seed

from headfuse.errors import ConfigError, HeadfuseError, MissingExtraError
from headfuse.models.loading import pick_device, stored_names
from headfuse.models.logits import window_nll
from headfuse.models.states import States, document_positions
from headfuse.text.stream import Batch, TrainingText
from headfuse.training.objective import Objective
from headfuse.training.run import Run
from headfuse.training.schedule import default_checkpoint_every, learning_rate_at, num_steps

logger = logging.getLogger(__name__)
STATE_SECONDS = 900.0
"""A state is written after so long, too, however many steps the next one is away."""
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Trackers of accelerate -> packages, of which one is needed."""


class Teacher(Protocol):
    """What the loop asks a teacher for; see `teacher.py`."""

    head: torch.nn.Module

    def states(self, batch: torch.Tensor, place: int | None, layers: bool = True) -> States:
        """The states on a batch; `place` is its place in the training stream, None for validation."""


@dataclass(frozen=True)
class Progress:
    """Where a run is after a step; `validation` is the last NLL on the held-out windows."""

    step: int
    steps: int
    tokens: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float
    validation: float | None = None


def make_accelerator(
    device: str, *, unused: bool, trackers: Sequence[str] = (), tracker_folder: Path | None = None
) -> Accelerator:
    """An accelerator for `--device`; what `accelerate launch` says about processes holds.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`.
        unused: whether a step may leave trained weights without a gradient.
        trackers: names in TRACKERS.
        tracker_folder: where they may write.

    Raises:
        MissingExtraError: for a tracker that is not installed.
    """
    for name in trackers:
        if name not in TRACKERS:
            raise ConfigError(f"{name!r} is unknown", where="--tracker", fix=f"choose from {', '.join(TRACKERS)}")
        if not any(map(find_spec, TRACKERS[name])):
            raise MissingExtraError(
                "is not installed", where=f"--tracker {name}", fix=f"pip install {TRACKERS[name][0]}"
            )
    # else transformers leaves every model but the first process's empty, and the teacher is not one that is sharded
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    target = pick_device(device)
    bfloat16 = target.type == "cuda" and torch.cuda.is_bf16_supported()
    return Accelerator(
        cpu=target.type == "cpu",
        mixed_precision="bf16" if bfloat16 else "no",
        log_with=list(trackers) or None,
        project_dir=tracker_folder,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )


def train(
    run: Run,
    accelerator: Accelerator,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher | None,
    text: TrainingText,
    *,
    eos: int | None,
    log_every: int = 1,
    trackers: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[torch.nn.Module, float, int]:
    """Take the steps that are left, and go back to the best state; returns the wrapped objective, seconds, tokens.

    Args:
        run: what was done before, and where states go.
        accelerator: see `make_accelerator`.
        objective: the student with its loss.
        optimizer: over its weights; a group may have a `factor` of the learning rate.
        teacher: for losses that need one.
        text: the training stream and the validation windows.
        eos: the token that ends a document, where documents do not see each other; else None.
        log_every: steps between two lines of the log.
        trackers: what trackers keep as the run's configuration; None without any.
        on_progress: called after every step, in every process.

    Raises:
        HeadfuseError: when the loss is not finite, or a state cannot be written.
    """
    recipe, start, world = run.recipe, run.step, accelerator.num_processes
    size, peak = recipe.batch_size, recipe.learning_rate
    assert size is not None
    assert peak is not None
    windows_per_step = size * recipe.gradient_accumulation * world
    tokens_per_step = windows_per_step * recipe.sequence_length
    steps = num_steps(recipe.tokens, tokens_per_step)
    layerwise = math.ceil(recipe.layerwise * steps)
    every = recipe.checkpoint_every or default_checkpoint_every(steps, windows_per_step, len(text.validation))
    set_seed(recipe.seed, device_specific=world > 1)  # processes must not draw the same dropout
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    if run.step:
        run.load(accelerator, run.step)
    if not run.figures:
        run.figures = {"nll_before": student_nll(accelerator, wrapped, text.validation), "nll_teacher": None}
        if teacher is not None:
            run.figures["nll_teacher"] = _nll(
                accelerator, text.validation, lambda b: window_nll(teacher.states(b, None, False).last, teacher.head, b)
            )
    if not start:
        run.log("start", recipe=recipe.named(), **run.inputs, steps=steps, **run.figures)
    if trackers is not None:
        folder = Path(accelerator.logging_dir)
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("headfuse", config=dict(trackers), init_kwargs={"wandb": {"dir": str(folder)}})

    validation = run.validations[max(run.validations)] if run.validations else run.figures["nll_before"]
    began = saved = time.monotonic()
    wrapped.train()
    done = range(0) if run.stopped else range(start + 1, steps + 1)
    with _ahead(text.batches(windows_per_step, run.text)) as batches:
        for step in done:
            rate = peak * learning_rate_at(step - 1, steps, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            batch, total = next(batches), torch.zeros((), device=accelerator.device)
            for micro in range(recipe.gradient_accumulation):
                last = micro == recipe.gradient_accumulation - 1
                first = (micro * world + accelerator.process_index) * size
                tokens = batch.windows[first : first + size]
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    place = (step - 1) * windows_per_step + first
                    states = None if teacher is None else teacher.states(tokens, place)
                    tokens = tokens.to(accelerator.device)
                    positions = None if eos is None else document_positions(tokens, eos)
                    loss = wrapped(tokens, states, positions, "layerwise" if step <= layerwise else "loss")
                    loss = loss / recipe.gradient_accumulation
                    accelerator.backward(loss)
                    total += loss.detach()
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), recipe.gradient_clip)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            now = time.monotonic()
            shared = torch.tensor([0.0, float(now - saved > STATE_SECONDS)], device=accelerator.device)
            shared[0] = total
            mean_loss, due = accelerator.reduce(shared, "mean").tolist()
            _check_finite(run, step, mean_loss, float(norm))
            optimizer.step()
            optimizer.zero_grad()

            seconds = time.monotonic() - began
            speed = (step - start) * tokens_per_step / seconds
            if step % log_every == 0 or step == steps:
                figures = {"loss": mean_loss, "learning_rate": rate, "tokens_per_second": speed}
                figures = {"tokens": step * tokens_per_step, **figures, "gradient_norm": float(norm)}
                run.log("step", step=step, **figures)
                if trackers is not None:
                    accelerator.log(figures, step=step)
            if (step % every == 0 or step == steps) and len(text.validation):
                validation = student_nll(accelerator, wrapped, text.validation)
                assert validation is not None
                _check_finite(run, step, validation, 0.0)
                run.validated(step, validation)
                if trackers is not None:
                    accelerator.log({"validation_nll": validation}, step=step)
            if step % every == 0 or step == steps or due:
                run.save(accelerator, step, batch)
                saved = time.monotonic()
                logger.info("step %d of %d: loss %.4f, NLL %s, state saved", step, steps, mean_loss, validation)
            progress = Progress(
                step=step,
                steps=steps,
                tokens=step * tokens_per_step,
                loss=mean_loss,
                learning_rate=rate,
                tokens_per_second=speed,
                seconds_left=(time.monotonic() - began) / (step - start) * (steps - step),
                validation=validation,
            )
            if on_progress is not None:
                on_progress(progress)
            if run.stopped:
                logger.info("step %d of %d: no better validation since step %d", step, steps, run.best)
                break
    seconds = time.monotonic() - began
    if trackers is not None:
        accelerator.end_training()
    if run.best and run.best != run.step:
        logger.info("the best validation was after step %d: going back to it", run.best)
        run.load(accelerator, run.best)
    wrapped.eval()
    return wrapped, seconds, (run.step - start) * tokens_per_step


def student_nll(accelerator: Accelerator, wrapped: torch.nn.Module, windows: torch.Tensor) -> float | None:
    """Mean NLL per token of windows, each process its share; None without windows."""
    training = wrapped.training
    wrapped.eval()
    nll = _nll(accelerator, windows, lambda batch: wrapped(batch, None, None, "nll"))
    wrapped.train(training)
    return nll


@torch.no_grad()
def _nll(accelerator: Accelerator, windows: torch.Tensor, nll: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
    if not len(windows):
        return None
    world, share = accelerator.num_processes, -(-len(windows) // accelerator.num_processes)
    order = [min(accelerator.process_index + i * world, len(windows) - 1) for i in range(share)]
    found = torch.cat([nll(part.to(accelerator.device)) for part in windows[order].split(8)])
    gathered = accelerator.gather(found.float().to(accelerator.device)).view(world, share)
    return gathered.T.flatten()[: len(windows)].double().cpu().mean().item() if world > 1 else found.mean().item()


@contextlib.contextmanager
def _ahead(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """The same batches, the next one read and tokenised in a thread while a step is computed."""
    with ThreadPoolExecutor(1) as worker:

        def generate() -> Iterator[Batch]:
            future = worker.submit(next, batches)
            while True:
                batch = future.result()
                future = worker.submit(next, batches)
                yield batch

        yield generate()


def _check_finite(run: Run, step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = f"the state after step {run.step} is kept" if run.step else "nothing was kept"
    raise HeadfuseError(
        f"the loss is {loss}, the norm of its gradient {norm}, at step {step}; {kept}",
        where=run.folder,
        fix="give a lower --learning-rate" + (", with --resume to go on from there" if run.step else ""),
    )


def weights_of(accelerator: Accelerator, wrapped: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights of the student by its own names; gathered, on the main process, where they are sharded."""
    if accelerator.distributed_type == DistributedType.FSDP:
        weights = accelerator.get_state_dict(wrapped)
    else:
        weights = accelerator.unwrap_model(wrapped).state_dict()
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    return stored_names(accelerator.unwrap_model(wrapped).model, weights)
