"""Starts the pretended device in a process, and asks it for its memory."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from tests.support.pretended_cuda import processes, torch_cuda
from tests.support.pretended_cuda.build import build

MEMORY = 80 * 2**30
_library: Any = None


def start(memory: int = MEMORY, float64: bool = True) -> None:
    """Make `cuda:0` a device of this process, for good.

    Args:
        memory: bytes that it has.
        float64: whether it computes in float64; without, it refuses what MPS refuses.

    Raises:
        UnavailableError: where it cannot be.
    """
    global _library
    if _library is not None:
        return
    _library = ctypes.CDLL(str(build()))
    for name in ("allocated", "peak"):
        getattr(_library, f"pretend_cuda_{name}").restype = ctypes.c_int64
    _library.pretend_cuda_limit.argtypes = [ctypes.c_int64]
    _library.pretend_cuda_start()
    _library.pretend_cuda_doubles(float64)
    limit(memory)
    torch_cuda.answer(allocated, peak, reset_peak)
    if torch.distributed.is_available():
        processes.over_gloo()


def started() -> bool:
    """Whether this process has the device."""
    return _library is not None


def allocated() -> int:
    """Bytes that tensors of the device hold."""
    return int(_library.pretend_cuda_allocated())


def peak() -> int:
    """The most that they held since `reset_peak`."""
    return int(_library.pretend_cuda_peak())


def reset_peak() -> None:
    """Begin the peak anew."""
    _library.pretend_cuda_reset_peak()


def limit(memory: int) -> None:
    """Give the device so many bytes: torch.OutOfMemoryError beyond them."""
    torch_cuda.PROPERTIES.total_memory = memory
    _library.pretend_cuda_limit(memory)
