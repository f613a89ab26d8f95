"""Answers for `torch.cuda` what a CPU-only build of PyTorch cannot."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="Pretended GPU", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=0, multi_processor_count=132,
    warp_size=32, is_integrated=False, gcnArchName="", max_threads_per_multi_processor=2048, L2_cache_size=50 * 2**20,
    regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448, uuid="pretended",
)  # fmt: skip
NATIVES: dict[str, Callable[..., Any]] = {
    "_cuda_getDevice": lambda: 0, "_cuda_getDeviceCount": lambda: 1, "_cuda_setDevice": lambda index: None,
    "_cuda_isCurrentStreamCapturing": lambda: False, "_cuda_exchangeDevice": lambda index: 0,
    "_cuda_maybeExchangeDevice": lambda index: 0, "_cuda_synchronize": lambda: None,
    "_cuda_getCurrentRawStream": lambda index: 0,
}  # fmt: skip
"""Functions of the C++ part that a CPU-only build lacks."""
Bytes = Callable[[], int]


def answer(allocated: Bytes, peak: Bytes, reset_peak: Callable[[], None]) -> None:
    """Put the answers into torch.cuda and torch.accelerator; the three tell of the device's memory."""
    for answers in (_device(), _memory(allocated, peak, reset_peak), _random(), _streams()):
        for name, each in answers.items():
            setattr(torch.cuda, name, each)
    for name in ("get_rng_state_all", "set_rng_state_all"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    for name, native in NATIVES.items():
        if not hasattr(torch._C, name):
            setattr(torch._C, name, native)
    _resizable()
    torch.serialization.register_package(5, lambda storage: None, _loaded)
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.is_available = lambda: True


def _device() -> dict[str, Any]:
    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: call(), "device_count": lambda: 1, "current_device": lambda: 0,
        "set_device": lambda device: None, "get_device_name": lambda *_: PROPERTIES.name,
        "get_device_properties": lambda *_: PROPERTIES, "get_device_capability": lambda *_: CAPABILITY,
        "get_arch_list": lambda: [f"sm_{CAPABILITY[0]}{CAPABILITY[1]}"], "is_bf16_supported": lambda *_, **__: True,
        "is_tf32_supported": lambda: True, "synchronize": lambda *_: None, "can_device_access_peer": lambda *_: False,
        "is_current_stream_capturing": lambda: False, "utilization": lambda *_: 0,
    }  # fmt: skip


def _memory(allocated: Bytes, peak: Bytes, reset_peak: Callable[[], None]) -> dict[str, Any]:
    def stats(*_: Any, **__: Any) -> dict[str, int]:
        return {"allocated_bytes.all.current": allocated(), "allocated_bytes.all.peak": peak()}

    return {
        "mem_get_info": lambda *_: (PROPERTIES.total_memory - allocated(), PROPERTIES.total_memory),
        "memory_allocated": lambda *_: allocated(), "max_memory_allocated": lambda *_: peak(),
        "memory_reserved": lambda *_: allocated(), "max_memory_reserved": lambda *_: peak(), "memory_stats": stats,
        "reset_peak_memory_stats": lambda *_: reset_peak(), "reset_max_memory_allocated": lambda *_: reset_peak(),
        "empty_cache": lambda: None, "ipc_collect": lambda: None,
    }  # fmt: skip


def _random() -> dict[str, Any]:
    """The generator is the CPU's."""
    state, set_state = torch.get_rng_state, torch.set_rng_state
    return {
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None, "seed": lambda: None,
        "seed_all": lambda: None, "initial_seed": torch.initial_seed, "get_rng_state": lambda *_: state(),
        "set_rng_state": lambda given, *_: set_state(given), "get_rng_state_all": lambda: [state()],
        "set_rng_state_all": lambda states: set_state(states[0]),
    }  # fmt: skip


def _streams() -> dict[str, Any]:
    one = Stream()
    return {
        "current_stream": lambda *_: one, "default_stream": lambda *_: one, "set_stream": lambda *_: None,
        "stream": On, "device": On, "device_of": On, "Stream": Stream, "Event": Event,
    }  # fmt: skip


class _Instant:
    """All work is done when a call returns: there is nothing to wait for."""

    def query(self) -> bool:
        return True

    def _nothing(self, *_: object, **__: object) -> None:
        pass

    synchronize = wait = wait_stream = wait_event = record_event = _nothing


class Stream(_Instant):
    """The one stream."""

    cuda_stream, device_index, priority = 0, 0, 0

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Event(_Instant):
    """A point in time."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds."""
        return 1000 * (later.at - self.at)


class On:
    """`torch.cuda.device(0)`, `torch.cuda.stream(s)`: there is one of each."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _resizable() -> None:
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return resize(storage, size)
        torch.ops.pretend.resize_storage(torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage), size)
        return storage

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]


def _loaded(storage: Any, location: str) -> Any:
    """A storage that `torch.load` brings to the device; PyTorch allocates none there without CUDA."""
    if not location.startswith("cuda"):
        return None
    untyped = storage._untyped_storage if hasattr(storage, "_untyped_storage") else storage
    return torch.empty(0, dtype=torch.uint8).set_(untyped).to("cuda").untyped_storage()
