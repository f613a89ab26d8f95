"""The state that lets an interrupted conversion go on: its plan, and the layers that are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headfuse.checkpoint.disk import write_whole
from headfuse.checkpoint.interrupted import STATE, read_resume
from headfuse.checkpoint.plan_file import read_plan
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.errors import ConfigError, HeadfuseError
from headfuse.models.source import Source
from headfuse.plan import FusionPlan
from headfuse.text.calibration import CalibrationText


@dataclass
class FinishedLayers:
    """The layers that are written, on disk for `--resume`."""

    path: Path
    writer: SafetensorsWriter
    layers: list[int]

    def write(self, layer_idx: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one more layer, and record it."""
        for name, tensor in tensors.items():
            self.writer.write(name, tensor)
        self.add(layer_idx)

    def add(self, layer_idx: int) -> None:
        """Record one more layer, once its weights are on the disk."""
        self.writer.sync()
        self.layers.append(layer_idx)
        write_whole(self.path, json.dumps(self.layers))


def text_digest(text: CalibrationText) -> str:
    """Hash of the tokens, because a file of the same name may hold another text when a run is resumed."""
    tokens = torch.cat([text.fitted.statistics, text.held_out])
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def resumed_plan(partial: Path, source: Source, options: dict[str, Any]) -> FusionPlan | None:
    """The plan of the interrupted run in this folder, if there is one.

    Raises:
        ConfigError: when that run had another source or other options.
    """
    if read_resume(partial, "fuse") is None:
        return None
    check_resumed(partial, options)
    plan = None if "source" in options else _plan_of(partial)  # that of a training is in its state
    if plan is not None and plan.source.fingerprint != source.checkpoint.fingerprint():
        raise _other_run(partial, ["source"])
    return plan and plan.model_copy(update={"source": source.identity()})


def check_resumed(partial: Path, options: dict[str, Any]) -> None:
    """Raise ConfigError when the interrupted run in this folder, if there is one, had other options."""
    state = read_resume(partial, "fuse")
    before = {} if state is None else state.get("options")
    before = before if isinstance(before, dict) else {}
    changed = [name for name in options if options[name] != before.get(name)]
    if state is not None and changed:
        raise _other_run(partial, changed)


def _other_run(partial: Path, changed: list[str]) -> ConfigError:
    return ConfigError(
        f"the interrupted run here was another one: it differs in {', '.join(changed)}",
        where=partial,
        fix="give --resume the source and the options of that run, or start anew with --overwrite alone",
    )


def _plan_of(partial: Path) -> FusionPlan:
    path, fix = partial / STATE / "plan.json", "start anew with --overwrite, without --resume"
    try:
        plan = read_plan(path)
    except HeadfuseError as error:
        raise ConfigError(error.what, where=error.where, fix=fix) from None
    if plan != plan.sealed():
        raise ConfigError("is not what the interrupted run wrote", where=path, fix=fix)
    return plan.model_copy(update={"seal": None})


def layers_done(path: Path) -> list[int] | None:
    """The layers that an interrupted run finished; None if there is no record, and then all are done again."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return layers if isinstance(layers, list) else None
