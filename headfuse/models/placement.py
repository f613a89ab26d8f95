"""Where weights, sums and the optimizer of a conversion are kept, decided by the memory of the device.

Layers, hidden states, captures and sums are always on the device, sums in float64 where it has that. What stays there
between two uses is the placement:

| placement | layers' weights | weights that are refined, with Adam's moments |
|---|---|---|
| `resident` | stay on the device, in their stored dtype | on the device |
| `streamed` | are copied to the device at every use | on the device |
| `host` | are copied to the device at every use | on the host: in half of its free memory, else in mapped files |
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from headfuse.choices import Placement
from headfuse.models.families import Architecture
from headfuse.models.host_memory import free_host_bytes

HOST_TOKENS = 512
"""Tokens that go through a layer at once on a CPU; a longer window goes alone."""
DEVICE_TOKENS = 8192
"""Most tokens that go through a layer at once on a device: this many keep it busy."""
BATCHES = 8
"""Fewest batches of a text on a device, if it has as many windows: some are fitted to, others are measured on."""
WORK_PER_TOKEN = 256
"""Bytes of working memory per token and hidden channel in one layer: MLP, attention, float64."""


@cache
def has_float64(kind: str) -> bool:
    """Whether devices of a kind, such as `cuda`, compute in float64: `mps` does not."""
    try:
        return bool(torch.zeros(1, dtype=torch.float64, device=kind).numel())
    except (TypeError, RuntimeError):
        return False


def exact(device: torch.device) -> torch.device:
    """The device for float64 sums of tensors on `device`: that device, or the CPU if it has no float64."""
    return device if has_float64(device.type) else torch.device("cpu")


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, or complex128, at the place that `exact` says."""
    # first there, then wider: such a device refuses even to hand it over
    return tensor.to(exact(tensor.device)).to(torch.complex128 if tensor.is_complex() else torch.float64)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a device; None for one that does not say, and for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def allocated_bytes(device: torch.device) -> int:
    """Bytes of this process's tensors on a device; 0 on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(torch.mps.current_allocated_memory()) if device.type == "mps" else 0


def has_room(device: torch.device, size: int) -> bool:
    """Whether this many bytes fit on a device beside the work on them: in half of the free memory."""
    free = free_bytes(device)
    return free is None or size <= free // 2


def optimizer_device(placement: Placement, device: torch.device, size: int) -> torch.device | None:
    """In whose memory refined weights and their moments lie, `size` bytes; None: in mapped files on the host."""
    if placement != "host":
        return device
    free = free_host_bytes()
    return torch.device("cpu") if free is not None and size <= free // 2 else None


def batch_tokens(device: torch.device, hidden_size: int) -> int:
    """Tokens that go through a layer at once; on a device they may take a quarter of the free memory."""
    free = free_bytes(device)
    if free is None:
        return HOST_TOKENS
    return max(HOST_TOKENS, min(DEVICE_TOKENS, free // 4 // (WORK_PER_TOKEN * hidden_size)))


def batch_windows(device: torch.device, windows: int, length: int, tokens: int) -> int:
    """Number of `windows` of this length that go through a layer at once, given the limit of tokens."""
    most = max(1, tokens // length)
    return most if device.type == "cpu" else min(most, -(-windows // BATCHES))


REFINED_BYTES = 12
"""Bytes of a refined weight: in float32, with its two moments."""
USABLE = 0.85
"""Share of the free memory that plans may use; the rest allows for fragmentation."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device, from the shapes of a model's tensors."""

    work: int
    """At work on one layer: embeddings and head, its weights in float32, one batch of tokens."""
    optimizer: int
    """Weights that are refined, in float32, with two moments."""
    layers: int
    """All layers in their stored dtype, and their attention once more, fused."""

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        arch: Architecture,
        num_layers: int,
        batch: int,
    ) -> DeviceMemory:
        """Those of a model; `batch` as numbers of a batch's hidden states."""
        prefixes = [arch.layer_prefix(i) + "." for i in range(num_layers)]
        inside = {name: math.prod(shape) for name, shape in shapes.items() if name.startswith(tuple(prefixes))}
        attention = {name for name in inside if f".{arch.attention}." in f".{name}"}
        first = sum(count for name, count in inside.items() if name.startswith(prefixes[0]))
        outer = sum(map(math.prod, shapes.values())) - sum(inside.values())
        refined = sum(inside[name] for name in attention)
        stored = sum(count * dtypes[name].itemsize for name, count in inside.items())
        again = sum(inside[name] * dtypes[name].itemsize for name in attention)
        return cls(4 * (outer + 3 * first) + WORK_PER_TOKEN * batch, REFINED_BYTES * refined, stored + again)

    def needed(self, placement: Placement) -> int:
        """Bytes that a placement takes."""
        kept = {"resident": self.optimizer + self.layers, "streamed": self.optimizer}
        return self.work + kept.get(placement, 0)

    def choose(self, placement: Placement, device: torch.device) -> Placement:
        """The placement itself or, for `auto`, the one that keeps the most of what fits on the device."""
        free = free_bytes(device)
        if device.type == "cpu" or (free is None and placement == "auto"):
            return "host"
        if placement != "auto" or free is None:
            return placement
        fitting: list[Placement] = [p for p in ("resident", "streamed") if self.needed(p) <= USABLE * free]
        return fitting[0] if fitting else "host"


def factories_on(device: torch.device) -> AbstractContextManager[object]:
    """While the block runs, torch.zeros, torch.eye and their like make tensors where `exact` says.

    For the closed form of a layer, which is written for moments at any place. Nothing is read from files meanwhile.
    """
    return contextlib.nullcontext() if exact(device).type == "cpu" else exact(device)


class Copies:
    """Device copies of host tensors, in their own dtype; each is copied once while the host tensor exists.

    Args:
        device: where layers are computed; on a CPU every tensor is its own copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made = WeakTensorKeyDictionary()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, in its own dtype or, if that is wider, in float32."""
        if tensor.device.type == self.device.type:
            return tensor
        if tensor not in self._made:
            wide = tensor.is_floating_point() and tensor.itemsize > torch.float32.itemsize
            self._made[tensor] = (tensor.to(torch.float32) if wide else tensor).to(self.device)
        copy: torch.Tensor = self._made[tensor]
        return copy

    def adopt(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        """Use a copy that is already on the device as the copy of this tensor."""
        self._made[tensor] = copy

    def exact(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where it can be widened to float64."""
        return self(tensor) if has_float64(self.device.type) else tensor.cpu()
