"""Memory and operations that are counted before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from headfuse.config.uptrain import UptrainConfig
from headfuse.models.loading import load_model
from headfuse.training.footprint import footprint, peak_flops
from headfuse.training.optimizer import make_optimizer, prepare_training
from tests.training.runs import without_dropout

LENGTH = 16


def recipe(**options: Any) -> UptrainConfig:
    return UptrainConfig(data={"a": 1.0}, tokens=64, batch_size=2, sequence_length=LENGTH, **options)


def prepared(source: Path, recipe: UptrainConfig) -> PreTrainedModel:
    without_dropout(source)
    student = load_model(source, device="cpu", dtype="float32")
    prepare_training(student, recipe)
    return student


def backward(student: PreTrainedModel) -> None:
    batch = torch.arange(2 * LENGTH).view(2, LENGTH)
    student.train()(batch, labels=batch).loss.backward()


@pytest.mark.parametrize("train", ["all", "attention"])
def test_operations_are_those_that_pytorch_counts(source: Path, train: str) -> None:
    student = prepared(source, recipe(train=train))
    student.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counted:
        backward(student)
    flops = footprint(student, None, recipe(train=train), 1, False).flops
    assert flops is not None
    assert flops * 2 * LENGTH == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_mixtures_of_experts_have_no_count(source: Path) -> None:
    student = prepared(source, recipe())
    student.config.num_experts = 4
    assert footprint(student, None, recipe(), 1, False).flops is None


@pytest.mark.parametrize(("decay", "copies"), [(0.0, 3), (0.99, 4)])
def test_the_optimizer_takes_the_bytes_that_are_said(source: Path, decay: float, copies: int) -> None:
    options = recipe(ema_decay=decay)
    student = prepared(source, options)
    optimizer = make_optimizer(student, options)
    backward(student)
    optimizer.step()
    held = [p.grad for p in student.parameters()]
    held += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    counted = footprint(student, None, options, 1, False)
    assert counted.optimizer == sum(tensor.numel() * 4 for tensor in held if tensor is not None)
    assert counted.optimizer == copies * 4 * sum(p.numel() for p in student.parameters())
    assert counted.student == 4 * sum(p.numel() for p in student.parameters())


def kept_for_backward(student: PreTrainedModel) -> int:
    """Bytes of all tensors that autograd holds between the forward and the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    seen = dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = torch.arange(2 * LENGTH).view(2, LENGTH)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student.train().model(batch)
    return sum(seen.values())


@pytest.mark.parametrize(("train", "most"), [("all", 1.3), ("attention", 1.6), ("lora", 1.8)])
def test_activations_are_a_little_more_than_what_autograd_keeps(source: Path, train: str, most: float) -> None:
    student = prepared(source, recipe(train=train, lora_rank=2))
    counted = footprint(student, None, recipe(train=train, lora_rank=2), 1, False).activations
    assert 1 <= counted / kept_for_backward(student) <= most


def test_checkpointing_takes_less(source: Path) -> None:
    kinds: tuple[Any, ...] = (False, "selective", True)
    sizes = [
        footprint(prepared(source, recipe()), None, recipe(gradient_checkpointing=kind), 1, False) for kind in kinds
    ]
    assert sizes[0].activations > sizes[1].activations > sizes[2].activations


def test_shards_divide_weights_and_optimizer(source: Path) -> None:
    student = prepared(source, recipe())
    whole, part = (footprint(student, student, recipe(), shards, True) for shards in (1, 4))
    for name in ("student", "optimizer", "teacher"):
        assert getattr(part, name) == getattr(whole, name) // 4
    assert part.activations == whole.activations


def test_peaks_go_by_the_name_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(torch.device("cuda")) == 312e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some other card")
    assert peak_flops(torch.device("cuda")) is None
    assert peak_flops(torch.device("cpu")) is None
