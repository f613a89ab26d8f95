"""The folder of a trained model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from headfuse.checkpoint.finish import finish_folder
from headfuse.checkpoint.hub import folder_name, in_cache
from headfuse.checkpoint.output import output_folder
from headfuse.checkpoint.paths import partial_folder
from headfuse.checkpoint.reader import DTYPE_NAMES
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.config.machine import TrainingMachine
from headfuse.errors import HeadfuseError
from headfuse.layouts.folder import ModelFolder
from headfuse.models.config import with_dtype
from headfuse.plan import FusionPlan
from headfuse.reporting.card import extended_card, uptrained_section
from headfuse.training.result import UptrainResult

CONFIG = "uptrain.yaml"
"""The file beside the weights that reproduces a run."""


def default_output(folder: Path) -> Path:
    """`<model>-uptrained`: beside a local folder, in the working directory for one of the hub's cache."""
    if in_cache(folder):
        return Path.cwd() / f"{folder_name(folder).rsplit('/')[-1]}-uptrained"
    path = folder if folder.name not in ("", "..") else folder.resolve()
    return path.with_name(f"{path.name}-uptrained")


@contextlib.contextmanager
def shared_folder(accelerator: Accelerator, output: Path, **options: Any) -> Iterator[Path]:
    """The folder in which the main process builds the output, and from which other processes read states."""
    if accelerator.is_main_process:
        with output_folder(output, **options) as making:
            accelerator.wait_for_everyone()
            yield making
    else:
        accelerator.wait_for_everyone()
        yield partial_folder(output)


def write_trained(
    partial: Path,
    model: ModelFolder,
    plan: FusionPlan | None,
    weights: Mapping[str, torch.Tensor],
    result: UptrainResult,
    machine: TrainingMachine,
) -> None:
    """Write the trained weights, with the names and files of the model that was trained, and the files beside them.

    Args:
        partial: the folder in the making.
        model: the folder that was trained.
        plan: its plan.json, as it was before the training.
        weights: the trained ones by name.
        result: for the model card.
        machine: names the dtype of all weights, by default each tensor's own in `model`.

    Raises:
        HeadfuseError: for a weight that the dtype cannot hold.
    """
    checkpoint, dtype = model.checkpoint, machine.dtype
    forced = DTYPE_NAMES[dtype] if dtype else None
    names = {name if name in weights else checkpoint.stored_names[name]: name for name in checkpoint.shapes}
    tensors = {written: (forced or checkpoint.dtypes[name], checkpoint.shapes[name]) for written, name in names.items()}
    writer = SafetensorsWriter(partial, tensors)
    for name, (kind, _) in tensors.items():
        tensor = weights[name].to("cpu", kind)
        if not torch.isfinite(tensor).all():
            raise HeadfuseError(f"{name} is beyond the range of {kind}", fix="write another --dtype, such as bfloat16")
        writer.write(name, tensor)
    finish_folder(
        partial,
        model.path,
        config=with_dtype(model.raw_config(), dtype),
        card=extended_card(model.path, result.output.name, uptrained_section(result)),
        options={CONFIG: f"# headfuse uptrain --config {CONFIG} MODEL\n{result.recipe.to_yaml()}"},
        plan=plan,
        trust_remote_code=machine.trust_remote_code,
    )
