"""The source model as a teacher."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.checkpoint.folder import resolve_model
from headfuse.checkpoint.plan_file import plan_in
from headfuse.checkpoint.reader import DTYPE_NAMES, Checkpoint, fingerprint
from headfuse.errors import CheckpointError, ConfigError, UnsupportedModelError
from headfuse.models.config import read_config
from headfuse.models.loading import guard_embeddings, load_model, load_tokenizer, loaded_dtype, model_name
from headfuse.models.states import States, capped, document_positions, model_states, softcap

logger = logging.getLogger(__name__)


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
        here = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        self.head: nn.Module = head if model.device == here else copy.deepcopy(head).to(device)

    @torch.no_grad()
    def states(self, batch: torch.Tensor, place: int | None, layers: bool = True) -> States:
        """The states of windows; see `loop.Teacher`."""
        batch = batch.to(self.model.device)
        positions = None if self.eos is None else document_positions(batch, self.eos)
        found = model_states(self.model, batch, positions, layers=self.layers and layers)
        move = [tuple(t.to(self.device) for t in part) for part in (found.inputs, found.outputs)]
        return States(found.last.to(self.device), *move)


def find_teacher(folder: Path, teacher: str | None) -> tuple[Path, str, str]:
    """The teacher's folder, name and fingerprint: the given one, else the plan's source, identified by its content.

    Raises:
        ConfigError: when there is none.
    """
    plan = plan_in(folder)
    if teacher is not None:
        chosen, name = resolve_model(teacher), model_name(teacher)
        content = fingerprint(chosen)
        if plan is not None and content != plan.source.fingerprint:
            logger.warning("the teacher %s is not the source named in plan.json, %s", name, plan.source.name)
        return chosen, name, content
    if plan is None:
        fix = "give the source model with --teacher, or train without one with --loss ce"
        raise ConfigError("has no plan.json that names its source", where=folder, fix=fix)
    source = plan.source
    short = source.name.rsplit("/", 1)[-1]
    tried = []
    for candidate in dict.fromkeys((folder.resolve().parent / short, Path(short), Path(source.name))):
        if (candidate / "config.json").is_file():
            if fingerprint(candidate) == source.fingerprint:
                return candidate, source.name, source.fingerprint
            tried.append(f"{candidate} is another model")
    for revision in dict.fromkeys((source.revision, None)) if "/" in source.name else ():
        try:
            candidate = resolve_model(source.name, revision)
            if fingerprint(candidate) == source.fingerprint:
                return candidate, source.name, source.fingerprint
            tried.append(f"{source.name} on the hub is another model")
        except CheckpointError as error:
            tried.append(error.what)
    reason = "; ".join(tried) or "no such folder beside it or in the working directory"
    raise ConfigError(
        f"the teacher was not found: it is the source {source.name} ({reason})",
        where=folder,
        fix="give the source model with --teacher, or train without one with --loss ce",
    )


def check_teacher(
    folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: bool, trust_remote_code: bool
) -> None:
    """Raise ConfigError for a teacher that the student cannot learn from; `layers`: also from the states of its
    layers.
    """
    fix = "give the model that this one was fused from"
    if load_tokenizer(folder, trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise ConfigError("the teacher has another tokenizer", where=folder, fix=fix)
    text, mine = (c.get_text_config() for c in (read_config(folder, trust_remote_code), student.config))
    rows = student.get_output_embeddings().weight.shape[0]
    if text.vocab_size != rows:
        raise ConfigError(f"the teacher predicts {text.vocab_size} tokens, the model {rows}", where=folder, fix=fix)
    if softcap(text) != softcap(mine):
        what = f"the teacher caps its logits at {softcap(text)}, the model at {softcap(mine)}"
        raise ConfigError(what, where=folder, fix=fix)
    shapes = [(c.num_hidden_layers, c.hidden_size) for c in (text, mine)]
    if layers and shapes[0] != shapes[1]:
        what = f"the teacher has (layers, hidden size) {shapes[0]}, the model {shapes[1]}"
        raise ConfigError(what, where=folder, fix="leave `hidden` and `layerwise` at 0, or " + fix)


def load_teacher(
    folder: Path, device: str, dtype: str | None, beyond: Mapping[int, str], trust_remote_code: bool
) -> PreTrainedModel:
    """Load a teacher; `beyond` has the tokens that it does not embed, with their ids."""
    teacher = load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    guard_embeddings(teacher, beyond, folder)
    check_head(teacher, folder)
    return teacher


def computing_dtype(folder: Path, device: str) -> str:
    """The default dtype in which `load_model` computes on a device; float32 where several are stored."""
    loaded = loaded_dtype(Checkpoint(folder), device)
    return next((name for name, kind in DTYPE_NAMES.items() if kind == loaded), "float32")


@torch.no_grad()
def check_head(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model whose logits are not the capped output embeddings of its scaled last hidden state."""
    batch = _some_tokens(model, 4)
    logits = capped(model.get_output_embeddings()(model_states(model, batch).last), softcap(model.config))
    if not _alike(model(batch).logits, logits):
        raise UnsupportedModelError(
            "computes its logits in a way that uptrain does not support", where=folder, fix="choose another model"
        )


@torch.no_grad()
def check_separation(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model in which positions that start anew do not keep documents apart: its family's mask does not read
    them (opt, gpt_oss, bloom).
    """
    batch = _some_tokens(model, 8)
    both = model_states(model, batch, torch.arange(8, device=model.device)[None] % 4).last
    if not _alike(both[:, 4:], model_states(model, batch[:, 4:]).last):
        raise UnsupportedModelError(
            "documents in a window see each other in this family, whatever their positions", where=folder,
            fix="leave packing at joined",
        )  # fmt: skip


def _some_tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Token ids `[1, count]` of the vocabulary."""
    return torch.arange(count, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    tolerance = 1e-3 if other.dtype == torch.float32 else 3e-2
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
