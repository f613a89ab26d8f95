"""The teacher of an uptraining run: found by the plan, checked, and asked for its states, live or from a disk."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.checkpoint import (
    DTYPE_NAMES,
    Checkpoint,
    fingerprint,
    mapped_tensor,
    read_config,
    read_plan,
    resolve_model,
    sync,
    write_whole,
)
from headfuse.distillation import States, document_positions, model_states
from headfuse.errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError
from headfuse.loading import load_tokenizer, model_name
from headfuse.recipe import Recipe

logger = logging.getLogger(__name__)

CACHE, WINDOWS, HIDDEN, HEAD = "cache.json", "windows.bin", "hidden.bin", "head.pt"


class LiveTeacher:
    """A teacher in memory.

    Args:
        model: the source, which may lie on another device and in another dtype than the student.
        device: where its states are wanted.
        eos: the token that ends a document, where documents do not see each other; else None.
        layers: give inputs and outputs of the layers as well.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, eos: int | None, layers: bool) -> None:
        self.model, self.device, self.eos, self.layers = model.requires_grad_(False).eval(), device, eos, layers
        head = model.get_output_embeddings()
        self.head: nn.Module = head if model.device == device else copy.deepcopy(head).to(device)

    @torch.no_grad()
    def states(self, batch: torch.Tensor, place: int | None, layers: bool = True) -> States:
        """The states of windows; `place` is None for windows of validation, which are read as one document."""
        batch = batch.to(self.model.device)
        positions = None if self.eos is None or place is None else document_positions(batch, self.eos)
        found = model_states(self.model, batch, positions, layers=self.layers and layers)
        move = [tuple(t.to(self.device) for t in part) for part in (found.inputs, found.outputs)]
        return States(found.last.to(self.device), *move)


class CachedTeacher:
    """What a teacher's head reads, on a disk: exact, in the dtype it was computed in, and without the teacher.

    Logits would take vocabulary / hidden_size times the space, and the largest of them alone are not the distribution.
    Rows are the windows of validation, then those of the training stream in their order, each kept with its tokens;
    a cache of other text, teacher or dtype is filled anew.

    Args:
        folder: where it lies.
        teacher: the teacher's folder.
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
        dtype: str,
        recipe: Recipe,
        validation: torch.Tensor,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder, self.validation, self.device = folder, validation, device
        self.identity = {
            "teacher": fingerprint(teacher),
            "hidden_size": read_config(teacher, trust_remote_code).get_text_config().hidden_size,
            "dtype": dtype,
            "sequence_length": recipe.sequence_length,
            "packing": recipe.packing,
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
            OutputError: where the folder is not a cache, or cannot hold it.
        """
        total, saved = len(self.validation) + rows, self._saved()
        full = saved is not None and saved["rows"] >= total
        if full and self._same_text(training, rows):
            logger.info("the teacher's states come from %s", self.folder.name)
        else:
            try:
                self._fill(training, total, load, accelerator, eos)
            except OSError as error:
                raise OutputError(
                    f"the teacher's states cannot be written: {error.strerror}",
                    where=self.folder,
                    fix="free some space, choose another --teacher-cache, or leave it out",
                ) from None
        self._open(total)
        kept = torch.load(self.folder / HEAD, weights_only=True)
        weight = kept["weight"]
        head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in kept, device="meta", dtype=weight.dtype)
        head.load_state_dict(kept, assign=True)
        self.head = head.to(self.device)

    def states(self, batch: torch.Tensor, place: int | None, layers: bool = False) -> States:
        """The states of the training windows from number `place` on, or of windows of validation."""
        if place is None:
            rows = [int((self.validation == window).all(dim=1).nonzero()[0]) for window in batch.cpu()]
        else:
            rows = [len(self.validation) + place + i for i in range(len(batch))]
        return States(self.hidden[rows].to(self.device))

    def _saved(self) -> dict[str, Any] | None:
        path = self.folder / CACHE
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
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
        size = sum(torch.Size(shape).numel() * width for shape, width in zip(self._shapes(rows), (8, 4), strict=True))
        logger.info("computing the teacher's states: %d windows, about %.1f GB", rows, size / 1e9)
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
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
                training_place = None if place < len(self.validation) else place
                self.hidden[place : place + len(batch)] = teacher.states(batch, training_place).last.cpu()
            place += len(batch)
        for name in (WINDOWS, HIDDEN):
            sync(self.folder / name)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sync(self.folder / HEAD)
            write_whole(self.folder / CACHE, json.dumps({"identity": self.identity, "rows": rows}) + "\n")
        accelerator.wait_for_everyone()


# ---------------------------------------------------------------- finding and checking


def find_teacher(folder: Path, teacher: str | None) -> tuple[Path, str]:
    """The teacher's folder and name: what was asked for, else the source of the plan, known by its content.

    Raises:
        ConfigError: when there is none.
    """
    if teacher is not None:
        chosen, name = resolve_model(teacher), model_name(teacher)
        if (folder / "plan.json").exists():
            source = read_plan(folder).source
            if fingerprint(chosen) != source.fingerprint:
                logger.warning("the teacher %s is not the source that plan.json names, %s", name, source.name)
        return chosen, name
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
    for revision in dict.fromkeys((source.revision, None)) if "/" in source.name else ():
        try:
            candidate = resolve_model(source.name, revision)
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


def check_teacher(
    folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: bool, trust_remote_code: bool
) -> None:
    """Raise ConfigError for a teacher whose states, `layers` those of its layers too, the student cannot learn from."""
    fix = "give the model that this one was fused from"
    if load_tokenizer(folder, trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise ConfigError("the teacher has another tokenizer", where=folder, fix=fix)
    text, mine = (c.get_text_config() for c in (read_config(folder, trust_remote_code), student.config))
    rows = student.get_output_embeddings().weight.shape[0]
    if text.vocab_size != rows:
        raise ConfigError(f"the teacher predicts {text.vocab_size} tokens, the model {rows}", where=folder, fix=fix)
    shapes = [(c.num_hidden_layers, c.hidden_size) for c in (text, mine)]
    if layers and shapes[0] != shapes[1]:
        what = f"the teacher has (layers, hidden size) {shapes[0]}, the model {shapes[1]}"
        raise ConfigError(what, where=folder, fix="leave `hidden` and `layerwise` at 0, or " + fix)


def computing_dtype(folder: Path, device: str) -> str:
    """The dtype in which `load_model` computes on a device, where none is asked for."""
    if device == "cpu":
        return "float32"
    stored = set(Checkpoint(folder).dtypes.values())
    return next((name for name, kind in DTYPE_NAMES.items() if stored == {kind}), "float32")


@torch.no_grad()
def check_head(model: PreTrainedModel, folder: Path) -> None:
    """The loss reads logits as `output embeddings (scaled last hidden state)`: refuse a model that caps them."""
    batch = torch.arange(4, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    if not torch.allclose(
        model(batch).logits, model.get_output_embeddings()(model_states(model, batch).last), rtol=1e-3
    ):
        raise UnsupportedModelError(
            "caps its logits, which uptrain does not support", where=folder, fix="choose another model"
        )
