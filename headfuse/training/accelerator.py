"""What accelerate does for a run: devices, processes, trackers, sharded weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from headfuse.choices import ComputeDtype
from headfuse.errors import ConfigError, MissingExtraError
from headfuse.models.loading import pick_device, stored_names
from headfuse.models.speed import Speed, warn_if_slow
from headfuse.models.states import decoder_layers

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Trackers of accelerate -> packages, of which one is needed."""


def make_accelerator(
    device: str,
    *,
    unused: bool,
    compute_dtype: ComputeDtype | None = None,
    trackers: Sequence[str] = (),
    tracker_folder: Path | None = None,
) -> Accelerator:
    """An accelerator for `--device`; what `accelerate launch` says about processes holds.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`.
        unused: whether a step may leave trained weights without a gradient.
        compute_dtype: of matrix products; by default bfloat16 on a GPU that has it, else float32.
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
    if compute_dtype is None:
        bfloat16 = target.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bfloat16 = compute_dtype == "bfloat16"
        warn_if_slow(Speed.measured(target, compute_dtype), compute_dtype)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # accelerate keeps the device of a process's first run
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=target.type == "cpu",
        mixed_precision="bf16" if bfloat16 else "no",
        log_with=list(trackers) or None,
        project_dir=tracker_folder,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )
    if bfloat16 and accelerator.is_fsdp2:
        _compute_in_bfloat16(accelerator)
    _save_without_wrappers(accelerator)
    return accelerator


def _save_without_wrappers(accelerator: Accelerator) -> None:
    """Let states hold whole weights by the model's own names, which any number of processes can read."""

    def plain(models: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
        return [accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]

    def on_save(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        if weights:  # not those of shards
            weights[:] = [model.state_dict() for model in plain(models)]

    def on_load(models: list[torch.nn.Module], folder: str) -> None:
        models[:] = plain(models)

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)


def shard_layers(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Spread the layers of a frozen model over all devices; embeddings and head are whole on each.

    Each layer is gathered for its forward pass and freed after it (FSDP2's fully_shard).
    """
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=True)
    model.to(accelerator.device)  # what is not sharded


def _compute_in_bfloat16(accelerator: Accelerator) -> None:
    """Let sharded layers compute in bfloat16 and sum gradients in float32.

    accelerate's own policy also rounds the teacher's states, the sums of gradients, and the NLL of validation.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def weights_of(accelerator: Accelerator, wrapped: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights of the student by its own names; gathered, on the main process, where they are sharded."""
    student = accelerator.unwrap_model(wrapped, keep_torch_compile=False)
    if accelerator.distributed_type == DistributedType.FSDP:
        weights = accelerator.get_state_dict(wrapped)
    else:
        weights = student.state_dict()
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}  # where it was compiled
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    return stored_names(student.model, weights)
