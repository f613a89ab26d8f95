"""How fast a machine multiplies matrices, for estimates of time."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import torch

from headfuse.choices import ComputeDtype

logger = logging.getLogger(__name__)

_FEW, _MANY, _WIDTH, _TRIES = 16, 512, 1024, 5
"""Rows of the two products that are timed, their other sizes, and how often each is tried."""
_SLOW = 0.02
"""Seconds of the small product from which on the large one is not tried: it could take minutes."""


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second of matrix products of a layer's size."""

    float32: float
    in_layers: float
    """Of products in the dtype that layers multiply in."""

    @classmethod
    def measured(cls, device: torch.device, compute_dtype: ComputeDtype) -> Speed:
        """The speed of this device, with layers that multiply in `compute_dtype`."""
        float32 = measured_speed(device, "float32")
        return cls(float32, float32 if compute_dtype == "float32" else measured_speed(device, compute_dtype))


def warn_if_slow(speed: Speed, compute_dtype: ComputeDtype) -> None:
    """Log a warning where products in a chosen dtype take longer than in float32."""
    if speed.in_layers < speed.float32:
        logger.warning(
            "On this machine, products in %s take %.1f times as long as in float32: leave out --compute-dtype.",
            compute_dtype, speed.float32 / speed.in_layers,
        )  # fmt: skip


def measured_speed(device: torch.device, dtype: ComputeDtype) -> float:
    """Floating-point operations per second of a matrix product of a layer's size, in a dtype."""
    kind: torch.dtype = getattr(torch, dtype)
    b = torch.ones(_WIDTH, _WIDTH, device=device, dtype=kind)
    for rows in (_FEW, _MANY):
        a, best = torch.ones(rows, _WIDTH, device=device, dtype=kind), math.inf
        for _ in range(_TRIES):
            start = time.perf_counter()
            float((a @ b)[0, 0])  # reading one number waits for the device
            best = min(best, time.perf_counter() - start)
        if best > _SLOW:
            break
    return 2 * a.numel() * _WIDTH / best
