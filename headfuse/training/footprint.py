"""Memory and work of a training run on one device, counted from the models before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from headfuse.config.uptrain import UptrainConfig
from headfuse.models.heads import head_dim
from headfuse.models.placement import allocated_bytes, free_bytes

logger = logging.getLogger(__name__)
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12,
}  # fmt: skip
"""Operations per second of dense products in bfloat16, by the vendors' data sheets, by a part of the device's name; the
first part that fits counts.
"""
ADAM = 8
"""Bytes of AdamW's moments per trained weight."""


@dataclass(frozen=True)
class Footprint:
    """What a run takes on one device.

    Attributes:
        student: bytes of the student's weights.
        optimizer: bytes of gradients, moments and averages of the trained weights.
        teacher: bytes of a teacher on the same device.
        activations: bytes that a forward pass keeps for the backward pass; rather too many where weights are frozen.
        flops: floating-point operations per training token of a perfect run, None for mixtures of experts. A layer
            that is computed twice counts once (model FLOPs, PaLM, 2204.02311, appendix B).
    """

    student: int
    optimizer: int
    teacher: int
    activations: int
    flops: float | None

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.student + self.optimizer + self.teacher + self.activations

    def __str__(self) -> str:
        parts = {
            "weights": self.student, "gradients and optimizer": self.optimizer, "teacher": self.teacher,
            "activations": self.activations,
        }  # fmt: skip
        shares = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
        return f"about {self.total / 1e9:.2f} GB on each device: {shares}"


def footprint(
    student: PreTrainedModel, teacher: PreTrainedModel | None, recipe: UptrainConfig, shards: int, bfloat16: bool
) -> Footprint:
    """Count a run whose trained weights are chosen.

    Args:
        student: the model that is trained, with `requires_grad` set.
        teacher: a teacher on the same device, with as many shards.
        recipe: its batch size is known.
        shards: devices that share the weights of each model.
        bfloat16: products are computed in bfloat16.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    kept = 4 + ADAM + 4 * (recipe.ema_decay > 0)  # the gradient, the moments, the average
    return Footprint(
        student=_bytes(student) // shards,
        optimizer=kept * count // shards,
        teacher=0 if teacher is None else _bytes(teacher) // shards,
        activations=_activations(student, recipe, 2 if bfloat16 else 4),
        flops=_flops(student, teacher, recipe),
    )


def report(counted: Footprint, device: torch.device) -> None:
    """Log what a run takes, and warn of what does not fit beside the models that are on the device already."""
    logger.info("%s", counted)
    free, needed = free_bytes(device), counted.total - allocated_bytes(device)
    if free is not None and needed > free:
        logger.warning(
            "The run may not fit on the device: it takes %.2f GB more, and %.2f GB are free (%s). It takes less with a "
            "smaller --batch-size and more --gradient-accumulation, with gradient_checkpointing: selective or true, "
            "and with --train attention or lora.",
            needed / 1e9, free / 1e9, counted,
        )  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Operations per second of products in bfloat16 that a device can reach; None for one that is not in PEAKS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _matrices(model: PreTrainedModel) -> list[tuple[int, bool]]:
    """The size of every matrix that a token is multiplied by, and whether it is trained."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    inside = [p for p in model.parameters() if p.ndim >= 2 and p is not embeddings and p is not head]
    return [(p.numel(), p.requires_grad) for p in (*inside, head)]


def _flops(student: PreTrainedModel, teacher: PreTrainedModel | None, recipe: UptrainConfig) -> float | None:
    config = student.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    scores = 4 * config.num_attention_heads * head_dim(config) * recipe.sequence_length * config.num_hidden_layers
    # forward; backward towards the input; backward towards the weight
    work = sum(2 * size * (3 if trained else 2) for size, trained in _matrices(student)) + 3 * scores
    if teacher is not None:
        work += sum(2 * size for size, _ in _matrices(teacher)) + scores
    return float(work)


def _activations(student: PreTrainedModel, recipe: UptrainConfig, itemsize: int) -> int:
    """Outputs of every projection of a layer, inputs of those that are trained, and the residual stream in float32
    before both blocks.
    """
    config = student.config.get_text_config()
    assert recipe.batch_size is not None
    tokens, layers = recipe.batch_size * recipe.sequence_length, config.num_hidden_layers
    heads = (student.get_input_embeddings(), student.get_output_embeddings())
    weights = {name: getattr(m, "weight", None) for name, m in student.named_modules() if m not in heads}
    matrices = [(name, w) for name, w in weights.items() if isinstance(w, torch.Tensor) and w.ndim == 2]
    ends = sum(w.shape[1] for _, w in matrices if w.requires_grad)
    ends += sum(w.shape[0] for name, w in matrices if ".lora_" not in name)  # what adapters add is part of the output
    layer, boundary = itemsize * ends / layers + 4 * 4 * config.hidden_size, 4 * config.hidden_size
    if recipe.gradient_checkpointing is True:
        return int(tokens * (layers * boundary + layer))
    if recipe.gradient_checkpointing == "selective":
        return int(tokens * (layers * (boundary + layer / 2) + layer / 2))
    return int(tokens * layers * (layer + boundary))
