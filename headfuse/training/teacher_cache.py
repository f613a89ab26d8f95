"""A teacher whose last hidden states are stored in a folder."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel

from headfuse.checkpoint.disk import sync, write_whole
from headfuse.checkpoint.locks import LOCK, locked
from headfuse.checkpoint.reader import num_bytes
from headfuse.checkpoint.writer import mapped_tensor
from headfuse.config.uptrain import UptrainConfig
from headfuse.errors import OutputError
from headfuse.models.config import read_config
from headfuse.models.states import States
from headfuse.training.teacher import LiveTeacher

logger = logging.getLogger(__name__)

CACHE, WINDOWS, HIDDEN, HEAD = "cache.json", "windows.bin", "hidden.bin", "head.pt"


class CachedTeacher:
    """A teacher's last hidden states, stored on disk: exact, in their computed dtype, without the teacher in memory.

    Logits would take vocabulary / hidden_size times the space, and the largest of them alone are not the distribution.
    Rows are the windows of validation, then those of the training stream in their order, each kept with its tokens;
    a cache of other text, teacher or dtype is filled anew.

    Args:
        folder: where it lies.
        teacher: the teacher's folder.
        content: its fingerprint.
        dtype: in which the states are computed and kept.
        recipe: for how windows are made.
        validation: windows `[n, length]`.
        device: where the states are wanted.
        trust_remote_code: run code that comes with the teacher.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Path,
        content: str,
        dtype: str,
        recipe: UptrainConfig,
        validation: torch.Tensor,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder, self.validation, self.device = folder, validation, device
        self.identity = {
            "teacher": content,
            "hidden_size": read_config(teacher, trust_remote_code).get_text_config().hidden_size,
            "dtype": dtype,
            "sequence_length": recipe.sequence_length,
            "packing": recipe.packing,
            # an earlier version read the validation windows as one document, whatever the packing
            **({"validation": "separate"} if recipe.packing == "separate" else {}),
        }
        self.head: nn.Module

    def prepare(
        self,
        training: Callable[[], Iterable[torch.Tensor]],
        rows: int,
        load: Callable[[], PreTrainedModel],
        accelerator: Accelerator,
        eos: int | None,
    ) -> None:
        """Make sure that the cache holds the validation windows and `rows` of `training()`; loads the teacher if not.

        Raises:
            OutputError: where the folder is not a cache, cannot hold it, or is being filled by another run.
        """
        total, saved = len(self.validation) + rows, self._saved()
        full = saved is not None and saved["rows"] >= total and self._whole(saved["rows"])
        if full and self._same_text(training, rows):
            logger.info("the teacher's states come from %s", self.folder.name)
        else:
            try:
                with self._locked(accelerator):
                    self._fill(training, total, load, accelerator, eos)
            except OSError as error:
                raise OutputError(
                    f"the teacher's states cannot be written: {error.strerror}",
                    where=self.folder,
                    fix="free some space, choose another --teacher-cache, or leave it out",
                ) from None
        kept = torch.load(self.folder / HEAD, weights_only=True)
        weight = kept["weight"]
        head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in kept, device="meta", dtype=weight.dtype)
        head.load_state_dict(kept, assign=True)
        self.head = head.to(self.device)

    def states(self, batch: torch.Tensor, place: int | None, layers: bool = False) -> States:
        """The states of training windows from index `place` on, or of validation windows."""
        if place is None:
            rows = [int((self.validation == window).all(dim=1).nonzero()[0]) for window in batch.cpu()]
        else:
            rows = [len(self.validation) + place + i for i in range(len(batch))]
        return States(self.hidden[rows].to(self.device))

    def _saved(self) -> dict[str, Any] | None:
        path = self.folder / CACHE
        if not path.exists():
            if self.folder.exists() and any(file.name != LOCK for file in self.folder.iterdir()):
                if (self.folder / WINDOWS).exists():
                    return None
                fix = "give an empty folder, or one that does not exist"
                raise OutputError("is not a cache of a teacher's states", where=self.folder, fix=fix)
            return None
        try:
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return saved if saved.get("identity") == self.identity else None

    def _shapes(self, rows: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
        length = self.identity["sequence_length"]
        return (rows, length), (rows, length, self.identity["hidden_size"])

    def _open(self, rows: int) -> None:
        windows, hidden = self._shapes(rows)
        self.windows = mapped_tensor(self.folder / WINDOWS, windows, torch.int64)
        self.hidden = mapped_tensor(self.folder / HIDDEN, hidden, getattr(torch, self.identity["dtype"]))

    def _whole(self, rows: int) -> bool:
        """Whether the files have their sizes: a mapped file that was cut off would be read as zeros."""
        files = [self.folder / name for name in (WINDOWS, HIDDEN)]
        sizes = zip(files, self._sizes(rows), strict=True)
        return all(file.exists() and file.stat().st_size >= size for file, size in sizes)

    def _sizes(self, rows: int) -> tuple[int, int]:
        """Bytes of the two files."""
        windows, hidden = self._shapes(rows)
        return num_bytes(torch.int64, windows), num_bytes(getattr(torch, self.identity["dtype"]), hidden)

    @contextlib.contextmanager
    def _locked(self, accelerator: Accelerator) -> Iterator[None]:
        """Let no other run fill the folder meanwhile; the first process's error is raised in all of them."""
        with contextlib.ExitStack() as stack:
            held: list[Exception | None] = [None]
            if accelerator.is_main_process:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(self.folder, "wait for it, or choose another --teacher-cache"))
                except (OutputError, OSError) as error:
                    held = [error]
            broadcast_object_list(held)
            if held[0] is not None:
                raise held[0]
            yield

    def _same_text(self, training: Callable[[], Iterable[torch.Tensor]], rows: int) -> bool:
        self._open(len(self.validation) + rows)
        place = len(self.validation)
        if not torch.equal(self.windows[:place], self.validation):
            return False
        for batch in training():
            if not torch.equal(self.windows[place : place + len(batch)], batch):
                return False
            place += len(batch)
        return True

    def _fill(
        self,
        training: Callable[[], Iterable[torch.Tensor]],
        rows: int,
        load: Callable[[], PreTrainedModel],
        accelerator: Accelerator,
        eos: int | None,
    ) -> None:
        logger.info("computing the teacher's states: %d windows, about %.1f GB", rows, sum(self._sizes(rows)) / 1e9)
        if accelerator.is_main_process:
            for name in (CACHE, WINDOWS, HIDDEN, HEAD):
                (self.folder / name).unlink(missing_ok=True)
            self._open(rows)
        accelerator.wait_for_everyone()
        self._open(rows)
        teacher = LiveTeacher(load(), self.device, eos, layers=False)
        if accelerator.is_main_process:
            torch.save(dict(teacher.head.state_dict()), self.folder / HEAD)
        place = 0
        for number, batch in enumerate((*self.validation.split(8), *training())):
            if number % accelerator.num_processes == accelerator.process_index:
                self.windows[place : place + len(batch)] = batch
                self.hidden[place : place + len(batch)] = teacher.states(batch, None).last.cpu()
            place += len(batch)
        for name in (WINDOWS, HIDDEN):
            sync(self.folder / name)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sync(self.folder / HEAD)
            write_whole(self.folder / CACHE, json.dumps({"identity": self.identity, "rows": rows}) + "\n")
        accelerator.wait_for_everyone()
