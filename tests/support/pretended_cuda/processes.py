"""Processes of torchrun, each with a device 0 of its own: gloo does NCCL's part."""

from __future__ import annotations

import os
from typing import Any

from torch import distributed


def over_gloo() -> None:
    """Send collectives of the device's tensors through gloo."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    init, factors = distributed.init_process_group, collectives._get_gradient_divide_factors

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init("cpu:gloo,cuda:gloo" if backend is None or "nccl" in backend else backend, *args, **kwargs)

    def sums(*args: Any, **kwargs: Any) -> Any:  # gloo has no mean
        return factors(*args[:5], **{**kwargs, "force_sum_reduction_for_comms": True})

    for module in (distributed, distributed.distributed_c10d):
        setattr(module, "init_process_group", init_process_group)  # noqa: B010
        setattr(module, "is_nccl_available", lambda: True)  # noqa: B010
    collectives._get_gradient_divide_factors = sums
    if "LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = "0"
