"""The training loop on accelerate: steps, validations, and states from which an interrupted run resumes exactly."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from headfuse.errors import HeadfuseError
from headfuse.models.logits import window_nll
from headfuse.models.states import States, document_positions
from headfuse.text.stream import Batch, TrainingText
from headfuse.training.averaging import averaged, swap_averages
from headfuse.training.batches import shared_batches
from headfuse.training.objective import Objective
from headfuse.training.run import Run
from headfuse.training.schedule import divide, learning_rate_at
from headfuse.training.validation import mean_nll, student_nll

logger = logging.getLogger(__name__)
STATE_SECONDS = 900.0
"""A state is also written after this many seconds, however many steps remain until the next one."""


class Teacher(Protocol):
    """The interface of a teacher; see `teacher.py`."""

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
    mfu: float | None = None
    """Share of the devices' peak that the model's operations reach; None where the peak is not known."""


@dataclass(frozen=True)
class Monitor:
    """How a run is observed while it goes on."""

    log_every: int = 1
    """Steps between two lines of the log."""
    trackers: Mapping[str, Any] | None = None
    """What trackers keep as the run's configuration; None without any."""
    on_progress: Callable[[Progress], None] | None = None
    """Called after every step, in every process."""
    seconds_at_peak: float | None = None
    """Seconds that a token takes if all devices reach their peak; None if that is not known."""


class TrainingLoop:
    """Takes the remaining steps of a run.

    Args:
        run: what was done before, and where states go; its recipe has a batch size and a learning rate.
        accelerator: see `make_accelerator`.
        objective: the student with its loss.
        optimizer: over its weights; a group may have a `factor` of the learning rate.
        teacher: for losses that need one.
        text: the training stream and the validation windows.
        eos: the token that ends a document, where documents do not see each other; else None.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        teacher: Teacher | None,
        text: TrainingText,
        eos: int | None,
    ) -> None:
        self.run, self.accelerator, self.teacher, self.text, self.eos = run, accelerator, teacher, text, eos
        self.start, self.steps = run.step, divide(run.recipe, accelerator.num_processes, len(text.validation))
        self.wrapped: nn.Module = objective
        self.optimizer = optimizer
        self.monitor = Monitor()
        self.validation: float | None = None
        self.began = self.saved = 0.0

    def train(self, monitor: Monitor) -> tuple[nn.Module, float, int]:
        """Take the remaining steps, then restore the best state, with the averages as weights.

        Returns:
            The wrapped objective, seconds and tokens.

        Raises:
            HeadfuseError: when the loss is not finite, or a state cannot be written.
        """
        self.monitor, run = monitor, self.run
        # processes must not draw the same dropout
        set_seed(run.recipe.seed, device_specific=self.accelerator.num_processes > 1)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.wrapped, self.optimizer)
        if self.start:
            run.load(self.accelerator, self.start)
        self._begin()
        self.began = self.saved = time.monotonic()
        self.wrapped.train()
        left = range(0) if run.stopped else range(self.start + 1, self.steps.number + 1)
        with shared_batches(self.accelerator, self.text.batches(self.steps.windows, run.text)) as batches:
            for step in left:
                self._take(step, next(batches))
                if run.stopped:
                    logger.info(
                        "stopping at step %d of %d: no better validation since step %d",
                        step,
                        self.steps.number,
                        run.best,
                    )
                    break
        seconds = time.monotonic() - self.began
        if monitor.trackers is not None:
            self.accelerator.end_training()
        if run.best and run.best != run.step:
            logger.info("the best validation was after step %d: restoring its weights", run.best)
            run.load(self.accelerator, run.best)
        swap_averages(self.optimizer)
        self.wrapped.eval()
        return self.wrapped, seconds, (run.step - self.start) * self.steps.tokens

    def _begin(self) -> None:
        """Measure the student and its teacher before the first step, and open the log and the trackers."""
        run, teacher, windows = self.run, self.teacher, self.text.validation
        if not run.figures:
            before = student_nll(self.accelerator, self.wrapped, windows, self.eos)
            run.figures = {"nll_before": before, "nll_teacher": None}
            if teacher is not None:
                cap = self.accelerator.unwrap_model(self.wrapped, keep_torch_compile=False).softcap
                run.figures["nll_teacher"] = mean_nll(
                    self.accelerator,
                    windows,
                    lambda b: window_nll(teacher.states(b, None, False).last, teacher.head, b, cap),
                )
        if not self.start:
            run.log("start", recipe=run.recipe.named(), **run.inputs, steps=self.steps.number, **run.figures)
        if self.monitor.trackers is not None:
            folder = Path(self.accelerator.logging_dir)
            folder.mkdir(parents=True, exist_ok=True)
            wandb = {"wandb": {"dir": str(folder)}}
            self.accelerator.init_trackers("headfuse", config=dict(self.monitor.trackers), init_kwargs=wandb)
        self.validation = run.validations[max(run.validations)] if run.validations else run.figures["nll_before"]

    def _take(self, step: int, batch: Batch) -> None:
        """Take one step, then write a log line, validate and save a state where they are due."""
        steps, last = self.steps, step == self.steps.number
        peak = self.run.recipe.learning_rate
        assert peak is not None
        rate = peak * learning_rate_at(step - 1, steps.number, self.run.recipe)
        loss, norm, late = self._optimize(step, batch, rate)
        speed = (step - self.start) * steps.tokens / (time.monotonic() - self.began)
        at_peak = self.monitor.seconds_at_peak
        mfu = None if at_peak is None else speed * at_peak
        if step % self.monitor.log_every == 0 or last:
            figures = {"loss": loss, "learning_rate": rate, "tokens_per_second": speed}
            figures |= {} if mfu is None else {"mfu": mfu}
            figures = {"tokens": step * steps.tokens, **figures, "gradient_norm": norm}
            self.run.log("step", step=step, **figures)
            self._track(figures, step)
        if (step % steps.every == 0 or last) and len(self.text.validation):
            self._validate(step)
        if step % steps.every == 0 or last or late:
            self.run.save(self.accelerator, step, batch)
            self.saved = time.monotonic()
            logger.info("step %d of %d: loss %.4f, NLL %s, state saved", step, steps.number, loss, self.validation)
        if self.monitor.on_progress is not None:
            self.monitor.on_progress(
                Progress(
                    step=step,
                    steps=steps.number,
                    tokens=step * steps.tokens,
                    loss=loss,
                    learning_rate=rate,
                    tokens_per_second=speed,
                    seconds_left=(time.monotonic() - self.began) / (step - self.start) * (steps.number - step),
                    validation=self.validation,
                    mfu=mfu,
                )
            )

    def _optimize(self, step: int, batch: Batch, rate: float) -> tuple[float, float, bool]:
        """Update the weights; return the loss, the norm of its gradient, and whether a state is due by time.

        All three are the same in every process.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        accelerator = self.accelerator
        total = self._backward(step, batch)
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), self.run.recipe.gradient_clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        late = time.monotonic() - self.saved > STATE_SECONDS
        shared = torch.tensor([0.0, float(late)], device=accelerator.device)
        shared[0] = total
        loss, due = accelerator.reduce(shared, "mean").tolist()
        _check_finite(self.run, step, loss, float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, float(norm), bool(due)

    def _backward(self, step: int, batch: Batch) -> torch.Tensor:
        """Leave the gradient of a step in the weights; returns the loss on this process's share of the batch."""
        accelerator, recipe = self.accelerator, self.run.recipe
        size = recipe.batch_size
        assert size is not None
        total = torch.zeros((), device=accelerator.device)
        for micro in range(recipe.gradient_accumulation):
            last = micro == recipe.gradient_accumulation - 1
            first = (micro * accelerator.num_processes + accelerator.process_index) * size
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss = self._loss(step, batch.windows[first : first + size], first) / recipe.gradient_accumulation
                accelerator.backward(loss)
                total += loss.detach()
        return total

    def _loss(self, step: int, windows: torch.Tensor, first: int) -> torch.Tensor:
        """The mean loss over windows, which begin with number `first`, from 0, of the step's."""
        place = (step - 1) * self.steps.windows + first
        states = None if self.teacher is None else self.teacher.states(windows, place)
        windows = windows.to(self.accelerator.device)
        positions = None if self.eos is None else document_positions(windows, self.eos)
        mode = "layerwise" if step <= self.steps.layerwise else "loss"
        loss: torch.Tensor = self.wrapped(windows, states, positions, mode)
        return loss

    def _validate(self, step: int) -> None:
        with averaged(self.optimizer):
            nll = student_nll(self.accelerator, self.wrapped, self.text.validation, self.eos)
        assert nll is not None
        _check_finite(self.run, step, nll, 0.0)
        self.run.validated(step, nll, self.steps.layerwise)
        self._track({"validation_nll": nll}, step)
        self.validation = nll

    def _track(self, figures: Mapping[str, float], step: int) -> None:
        if self.monitor.trackers is not None:
            self.accelerator.log(dict(figures), step=step)


def _check_finite(run: Run, step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = f"the state after step {run.step} is kept" if run.step else "nothing was kept"
    raise HeadfuseError(
        f"the loss is {loss}, the norm of its gradient {norm}, at step {step}; {kept}",
        where=run.folder,
        fix="give a lower --learning-rate" + (", with --resume to go on from there" if run.step else ""),
    )
