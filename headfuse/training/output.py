"""The folder of a trained model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from headfuse.checkpoint.folder import copy_companions
from headfuse.checkpoint.hub import folder_name, in_cache
from headfuse.checkpoint.output import output_folder, partial_folder
from headfuse.checkpoint.plan_file import read_plan, write_plan
from headfuse.checkpoint.reader import DTYPE_NAMES
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.config.machine import TrainingMachine
from headfuse.errors import HeadfuseError
from headfuse.models.config import raw_config
from headfuse.models.weights import ModelWeights, untie
from headfuse.reporting.card import card_section, extended_card
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
    """The folder in which the main process makes the output, and from which the others read states."""
    if accelerator.is_main_process:
        with output_folder(output, **options) as making:
            accelerator.wait_for_everyone()
            yield making
    else:
        accelerator.wait_for_everyone()
        yield partial_folder(output)


def write_trained(
    partial: Path,
    stored: ModelWeights,
    weights: Mapping[str, torch.Tensor],
    result: UptrainResult,
    machine: TrainingMachine,
) -> None:
    """Write the trained weights with names and files as in the model that was trained, and what belongs beside them.

    Args:
        partial: the folder in the making.
        stored: the weights of the model that was trained.
        weights: the trained ones by name.
        result: for the model card.
        machine: names the dtype of all weights, by default each tensor's own in `stored`.

    Raises:
        HeadfuseError: for a weight that the dtype cannot hold.
    """
    layout, dtype = stored.checkpoint, machine.dtype
    source, forced = layout.folder, DTYPE_NAMES[dtype] if dtype else None
    names = {name if name in weights else layout.stored_names[name]: name for name in layout.shapes}
    tensors = {written: (forced or layout.dtypes[name], layout.shapes[name]) for written, name in names.items()}
    writer = SafetensorsWriter(partial, tensors)
    for name, (kind, _) in tensors.items():
        tensor = weights[name].to("cpu", kind)
        if not torch.isfinite(tensor).all():
            raise HeadfuseError(f"{name} is beyond the range of {kind}", fix="write another --dtype, such as bfloat16")
        writer.write(name, tensor)
    config = raw_config(source)
    config = untie(config) if stored.untied else config
    if dtype is not None:
        config["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_companions(source, partial, machine.trust_remote_code)
    if (source / "headfuse.yaml").exists():
        shutil.copyfile(source / "headfuse.yaml", partial / "headfuse.yaml")
    (partial / CONFIG).write_text(
        f"# headfuse uptrain --config {CONFIG} MODEL\n{result.recipe.to_yaml()}", encoding="utf-8"
    )
    card = extended_card(source, result.output.name, card_section(result))
    (partial / "README.md").write_text(card, encoding="utf-8")
    if (source / "plan.json").exists():
        write_plan(partial, read_plan(source))
