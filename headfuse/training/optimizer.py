"""The parameters that are trained, and their optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from headfuse.config.uptrain import UptrainConfig
from headfuse.errors import ConfigError, MissingExtraError
from headfuse.models.attention import packed_keys_and_values
from headfuse.models.heads import head_layout
from headfuse.models.weights import stored_architecture
from headfuse.training.averaging import keep_averages

MATRICES = (torch.nn.Linear, Conv1D)
"""Modules that autocast runs in its own dtype, regardless of the dtype of their weights."""


def prepare_training(student: PreTrainedModel, recipe: UptrainConfig) -> Callable[[], None]:
    """Choose the trained weights; return a function that merges adapters into them at the end.

    Frozen matrices keep the dtype that they were loaded in; all else is float32, the states between layers too.
    """
    if recipe.gradient_checkpointing:
        if recipe.layerwise and not hasattr(student, "activation_checkpointing_enable"):
            fix = "update transformers to 5.24, or leave one of them out"
            raise ConfigError("does not go with layerwise here", where="gradient_checkpointing", fix=fix)
        kept = partial(create_selective_checkpoint_contexts, _products())
        selective = {"context_fn": kept} if recipe.gradient_checkpointing == "selective" else {}
        # the name from transformers 5.24 on, or the one before
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable({"use_reentrant": False, **selective})
    if recipe.train == "all":
        return lambda: None
    config, arch = student.config, stored_architecture(student.config)
    prefixes = tuple(f"{arch.attention_prefix(i)}." for i in range(config.get_text_config().num_hidden_layers))
    if recipe.train == "attention":
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))
        _widen(student)
        return lambda: None
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtraError(
            "peft is not installed", where="train: lora", fix="pip install 'headfuse[lora]'"
        ) from None
    linear = [n for n, m in student.named_modules() if isinstance(m, MATRICES) and n.startswith(prefixes)]
    student.requires_grad_(False)
    _widen(student)
    torch.manual_seed(recipe.seed)
    adapted = get_peft_model(
        student, LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=linear)
    )

    def merge() -> None:
        adapted.merge_and_unload()

    return merge


def _products() -> list[Any]:
    """Operations that cost more time than their outputs cost memory: matrix products and attention."""
    attention = (
        "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu",
        "fused_attention_overrideable",
    )  # fmt: skip
    names = ("mm", "addmm", "bmm", "baddbmm", *(f"_scaled_dot_product_{name}" for name in attention))
    return [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]


def _widen(student: PreTrainedModel) -> None:
    """Bring all weights but frozen matrices to float32."""
    head = student.get_output_embeddings()  # read outside its module, and often tied to the embeddings
    for module in student.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad or module is head or not isinstance(module, MATRICES):
                parameter.data = parameter.data.to(torch.float32)


def make_optimizer(model: PreTrainedModel, recipe: UptrainConfig, sharded: bool = False) -> torch.optim.Optimizer:
    """AdamW over all trained weights; keys and values have their own rate, applied by rows in packed projections.

    Raises:
        ConfigError: for packed projections that are sharded.
    """
    arch, rate = stored_architecture(model.config), recipe.fused_learning_rate
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = () if arch.packed else (f".{arch.key}.", f".{arch.value}.")
    fused = [parameter for name, parameter in named if any(part in name for part in parts)]
    others = [parameter for name, parameter in named if not any(part in name for part in parts)]
    groups = [{"params": others, "factor": 1.0}, {"params": fused, "factor": rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True)
    if arch.packed and rate != 1:
        if sharded:
            fix = "give a recipe with fused_learning_rate: 1, or fuse the source with --layout decoupled"
            raise ConfigError(
                f"a sharded {arch.packed} can have only one learning rate",
                where="fused_learning_rate",
                fix=fix,
            )
        heads, packed = head_layout(model.config), list[tuple[torch.Tensor, int, torch.Tensor]]()
        for name, parameter in named:
            if f".{arch.packed}." in name and ".lora_A." not in name:  # what an adapter reads is not of any head
                dim = int(arch.transposed and parameter.ndim == 2 and ".lora_" not in name)
                rows = packed_keys_and_values(arch, heads, parameter.shape[dim])
                packed.append((parameter, dim, rows.to(parameter.device)))
        _scale_steps(optimizer, packed, rate)
    if recipe.ema_decay:
        keep_averages(optimizer, recipe.ema_decay)  # after the hook that scales steps
    return optimizer


def _scale_steps(
    optimizer: torch.optim.Optimizer, parts: Sequence[tuple[torch.Tensor, int, torch.Tensor]], factor: float
) -> None:
    """Multiply the steps of some rows; `parts` are parameters, the dimension of their rows, and indices."""
    before = list[torch.Tensor]()

    def keep(*_: object) -> None:
        before[:] = [parameter.detach().index_select(dim, rows) for parameter, dim, rows in parts]

    def scale(*_: object) -> None:
        for (parameter, dim, rows), old in zip(parts, before, strict=True):
            new = parameter.detach()
            new.index_copy_(dim, rows, old.lerp(new.index_select(dim, rows), factor))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(scale)
