"""Every check before the work, shared by a conversion and its dry run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import headfuse
from headfuse.checkpoint.output_checks import check_output, check_space
from headfuse.checkpoint.paths import partial_folder
from headfuse.checkpoint.reader import DTYPE_NAMES
from headfuse.config.command import FUSE
from headfuse.config.fuse import FuseConfig
from headfuse.config.machine import FusingMachine
from headfuse.conversion.output import default_output
from headfuse.conversion.resume import check_resumed, text_digest
from headfuse.dha import pipeline as dha
from headfuse.fusion import FUSION_METHODS
from headfuse.models.loading import pick_device
from headfuse.models.source import Source
from headfuse.models.speed import Speed, warn_if_slow
from headfuse.plan import FusionPlan
from headfuse.planning.layout_choice import check_budget, with_layout, with_possible_width
from headfuse.planning.review import reviewed_plan
from headfuse.text.calibration import CalibrationText


@dataclass(frozen=True)
class Prepared:
    """The checked inputs of a conversion; `--dry-run` ends here."""

    source: Source
    config: FuseConfig
    plan: FusionPlan | None
    """The reviewed plan as it was read, not yet adopted for this source."""
    kv_channels: int
    """Numbers per token in the fused model's cache."""
    output: Path
    text: CalibrationText
    machine: FusingMachine
    device: torch.device
    speed: Speed
    """Of the device, in the dtype that layers multiply in."""
    options: dict[str, Any]
    """What an interrupted run must share with this one, as far as it is known without reading weights."""


def prepare(
    model: str | Path,
    config: FuseConfig | str | Path | None = None,
    *,
    output: str | Path | None = None,
    plan: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Prepared:
    """Make every check before the work; reads headers and text, and writes nothing.

    Args: as of `fuse`.

    Raises:
        HeadfuseError: for a model, plan, budget, text, device or output that cannot be used.
    """
    config, machine = FUSE.read(config, options)
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    device = pick_device(machine.device)
    speed = Speed.measured(device, machine.compute_dtype)
    warn_if_slow(speed, machine.compute_dtype)
    source = Source.open(str(model), machine.trust_remote_code)
    ready = None
    if plan is not None:
        ready, config = reviewed_plan(Path(plan), source, with_possible_width(config, source))
    else:
        config = with_possible_width(with_layout(config, source.config)[0], source)
    output = default_output(source, config, ready) if output is None else Path(output)
    check_output(output, overwrite=overwrite, resume=resume, reads=[source.folder])
    kept = check_budget(config, source) if ready is None else ready.kv_channels
    if FUSION_METHODS[config.method].trained:
        dha.check_family(source)
    check_space(output, _written_bytes(source, kept, machine.dtype))
    text = source.calibration_text(config.calibration, config.seed, machine.trust_remote_code)
    options = {
        "headfuse": headfuse.__version__,
        "config": config.to_yaml(),
        "text": text_digest(text),
        "dtype": machine.dtype,
        "compute_dtype": machine.compute_dtype,
    }
    if resume:
        check_resumed(partial_folder(output), options)
    return Prepared(source, config, ready, kept, output, text, machine, device, speed, options)


def _written_bytes(source: Source, kv_channels: int, dtype: str | None) -> int:
    """Lower bound of the bytes to write: those of the source without the removed channels."""
    heads, checkpoint = source.heads, source.checkpoint
    fixed = None if dtype is None else DTYPE_NAMES[dtype].itemsize
    whole = sum(math.prod(s) * (fixed or checkpoint.dtypes[name].itemsize) for name, s in checkpoint.shapes.items())
    gone = (heads.kv_channels - kv_channels) * (heads.hidden_size + 1)
    return whole - gone * (fixed or max(kind.itemsize for kind in checkpoint.dtypes.values()))
