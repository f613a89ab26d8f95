"""Where the work of a conversion lies: sums in float64 on the device that has it."""

from __future__ import annotations

from functools import cache

import torch


@cache
def has_float64(kind: str) -> bool:
    """Whether devices of a kind, such as `cuda`, compute in float64: `mps` does not."""
    try:
        return bool(torch.zeros(1, dtype=torch.float64, device=kind).numel())
    except (TypeError, RuntimeError):
        return False


def exact(device: torch.device) -> torch.device:
    """Where sums in float64 of what lies on a device are made: there, or on the CPU."""
    return device if has_float64(device.type) else torch.device("cpu")


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, or complex128, at the place that `exact` says."""
    # first there, then wider: such a device refuses even to hand it over
    return tensor.to(exact(tensor.device)).to(torch.complex128 if tensor.is_complex() else torch.float64)


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in float32 on a device; what travels has the narrower of both dtypes."""
    if tensor.itemsize > torch.float32.itemsize:
        return tensor.to(torch.float32).to(device)
    return tensor.to(device).to(torch.float32)
