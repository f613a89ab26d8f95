"""The dtype of matrix products outside the layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def products_like(compute_dtype: torch.dtype) -> Iterator[None]:
    """Products of float32 matrices round their factors as layers of this dtype do, while the block runs.

    Sums and results stay in float32, so logits of a large vocabulary keep their digits. On a CPU factors are rounded to
    bfloat16, on a GPU to TF32. Nothing changes where `compute_dtype` is float32.
    """
    before = torch.get_float32_matmul_precision()
    if compute_dtype != torch.float32:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
