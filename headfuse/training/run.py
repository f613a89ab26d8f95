"""The state and the log of a training run."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headfuse.checkpoint.companions import TRAIN_LOG
from headfuse.checkpoint.disk import sync
from headfuse.checkpoint.interrupted import RESUME, STATE, read_resume, write_resume
from headfuse.config.uptrain import UptrainConfig
from headfuse.errors import ConfigError, OutputError
from headfuse.text.stream import Batch
from headfuse.training.schedule import windows_per_step, with_batch_size

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

DIVISION = ("batch_size", "gradient_accumulation", "processes")
"""What divides the windows of a step, and may change when a run is resumed; their product may not."""
_ANEW = "start anew with --overwrite, without --resume"


class RunLog:
    """train_log.jsonl of an output in the making: one JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / TRAIN_LOG

    def add(self, **record: Any) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def keep(self, wanted: Callable[[int, dict[str, Any]], bool]) -> None:
        """Keep the lines that `wanted` accepts, given a line's number from 0 and its record."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = []
        for number, line in enumerate(lines):
            with contextlib.suppress(json.JSONDecodeError):  # a line that was cut short
                if wanted(number, json.loads(line)):
                    kept.append(line)
        self.path.write_text("".join(kept), encoding="utf-8")


@contextlib.contextmanager
def saving(unfinished: Path, folder: Path, what: str, kept: str = "") -> Iterator[None]:
    """Write a state under the name `unfinished`, which is removed if the disk is full.

    Raises:
        OutputError: that `what` cannot be written, and what is `kept`.
    """
    try:
        yield
    except RuntimeError as error:  # how torch.save reports a full disk
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
        reason = f"{what} cannot be written{kept}: {error}"
        raise OutputError(reason, where=folder, fix="free some space, then go on with --resume") from None


class Run:
    """An output in the making: its log, and the states from which an interrupted run resumes.

    A state is a folder `state/step-N` that gets its name when it is complete; resume.json, replaced in one step, says
    which one counts, and which one is the best. With several processes the first one writes, and all read.

    Args:
        folder: where the output is made.
        recipe: what is trained.
        inputs: what else the result depends on, with the number of `processes`.
        resume: go on with the run that is in the folder.
        main: whether this process writes.

    Raises:
        ConfigError: when the run in the folder had other options.
    """

    def __init__(
        self, folder: Path, recipe: UptrainConfig, inputs: dict[str, Any], resume: bool, main: bool = True
    ) -> None:
        self.folder, self.recipe, self.inputs, self.main = folder, recipe, inputs, main
        self.step, self.best, self.stopped = 0, 0, False
        self._log = RunLog(folder)
        self.text: dict[str, Any] | None = None
        self.epochs = 0
        self.validations: dict[int, float] = {}
        self.figures: dict[str, float | None] = {}
        saved = read_resume(folder, "uptrain") if resume else None
        if saved is not None:
            try:
                self._go_on(saved)
            except (KeyError, TypeError, ValueError, AttributeError):
                raise OutputError("is damaged", where=folder / RESUME, fix=_ANEW) from None
        elif main:
            shutil.rmtree(folder / STATE, ignore_errors=True)
            (folder / RESUME).unlink(missing_ok=True)
        self.recipe = with_batch_size(self.recipe, inputs["processes"])
        if main:
            self._log.keep(self._logged)

    def _go_on(self, saved: dict[str, Any]) -> None:
        before = {**saved["recipe"], **saved["inputs"]}
        step = self._divide([before.pop(name) for name in DIVISION])
        now = {name: value for name, value in {**self.recipe.named(), **self.inputs}.items() if name not in DIVISION}
        rate, saved_rate = now.pop("learning_rate"), before.pop("learning_rate")
        changed = [f"{name} (was {before.get(name)}, is {now[name]})" for name in now if now[name] != before.get(name)]
        if changed or step:
            raise ConfigError(
                f"the interrupted run had other options: {', '.join(step + changed)}",
                where=self.folder,
                fix="resume with the same options, or start anew with --overwrite"
                + "; another number of processes needs a --batch-size that gives the same windows" * bool(step),
            )
        if rate not in (None, saved_rate):
            logger.warning("Continuing with learning rate %g instead of %g.", rate, saved_rate)
        self.recipe = self.recipe.model_copy(update={"learning_rate": rate or saved_rate})
        self.step, self.best, self.stopped = saved["step"], saved["best"], saved["stopped"]
        self.text, self.epochs, self.figures = saved["text"], saved["epochs"], saved["figures"]
        self.validations = {int(step): nll for step, nll in saved["validations"].items()}

    def _divide(self, before: list[int]) -> list[str]:
        """Divide the windows of a step among the processes of today; returns why that cannot be.

        Args:
            before: batch size, gradient accumulation and processes of the interrupted run.
        """
        windows, processes, passes = math.prod(before), self.inputs["processes"], self.recipe.gradient_accumulation
        if self.recipe.batch_size is None and windows % (passes * processes) == 0:
            self.recipe = self.recipe.model_copy(update={"batch_size": windows // (passes * processes)})
        size = self.recipe.batch_size
        if size is None or windows_per_step(self.recipe, processes) != windows:
            were, are = " x ".join(map(str, before)), f"{size or 'default'} x {passes} x {processes}"
            return [f"batch_size x gradient_accumulation x processes (was {were}, is {are})"]
        if processes != before[-1]:
            logger.info("continuing in %d processes instead of %d, with the same batches", processes, before[-1])
        return []

    def load(self, accelerator: Accelerator, step: int) -> None:
        """Restore model, optimizer and random numbers of a state.

        Raises:
            OutputError: when it is missing or damaged.
        """
        if not self._state(step).is_dir():
            raise OutputError("the state of the interrupted run is missing", where=self._state(step), fix=_ANEW)
        try:
            accelerator.load_state(str(self._state(step)))
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch.load and accelerate raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise OutputError(f"cannot be read: {reason}", where=self._state(step), fix=_ANEW) from None

    def save(self, accelerator: Accelerator, step: int, batch: Batch) -> None:
        """Write the state after `step` steps; the last one, and the best, stay until this one is complete."""
        new, path = self.folder / STATE / "new", self._state(step)
        if self.main:
            shutil.rmtree(new, ignore_errors=True)
        accelerator.wait_for_everyone()
        kept = f"; the state after step {self.step} is kept" if self.step else ""
        with saving(new, self.folder, f"the checkpoint after step {step}", kept):
            accelerator.save_state(str(new), safe_serialization=False)  # keeps tied weights
            accelerator.wait_for_everyone()
            if self.main:
                for file in (*new.iterdir(), new):
                    sync(file)
        self.step, self.text, self.epochs = step, batch.state, batch.epochs
        if self.main:
            shutil.rmtree(path, ignore_errors=True)
            new.rename(path)
            names = ("step", "best", "stopped", "text", "epochs", "inputs", "figures", "validations")
            write_resume(
                self.folder, "uptrain", {"recipe": self.recipe.named(), **{n: getattr(self, n) for n in names}}
            )
            for old in (self.folder / STATE).glob("step-*"):
                if old not in (path, self._state(self.best)):
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def validated(self, step: int, nll: float, layerwise: int) -> None:
        """Record a validation: it may be the best one, or exceed the patience.

        Those of the first `layerwise` steps, in which each layer learns alone, do not count against it.
        """
        self.validations[step] = nll
        if not self.best or nll < self.validations[self.best]:
            self.best = step
        since = sum(later > max(self.best, layerwise) for later in self.validations)
        self.stopped = self.recipe.patience is not None and since >= self.recipe.patience
        self.log("validation", step=step, nll=nll, best=self.best == step)

    def _state(self, step: int) -> Path:
        return self.folder / STATE / f"step-{step:07d}"

    def log(self, event: str, **values: Any) -> None:
        """Add a line to the log."""
        if self.main:
            self._log.add(event=event, **values)

    def _logged(self, number: int, record: dict[str, Any]) -> bool:
        """Whether a line of the log describes something that the state includes."""
        return self.step > 0 and (record["event"] == "start" or record.get("step", self.step + 1) <= self.step)
