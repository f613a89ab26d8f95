"""A start of benchmarks/recovery.py by another converter: key and value weights of low rank, which training keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.utils import parametrize

from headfuse.training import uptrain

CALIBRATION_TOKENS = 128 * 512
"""What benchmarks/peers.py gives a peer to read."""


class Product(torch.nn.Module):
    """A weight `[rows, columns]` as the product of two factors, which are what is trained."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The weight, of `[rows, rank]` and `[rank, columns]`."""
        return left @ right

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of equal size whose product is the weight; its rank may not be larger."""
        left, size, right = torch.linalg.svd(weight.double(), full_matrices=False)
        if size[self.rank :].sum() > 1e-4 * size.sum():
            raise ValueError(f"a weight of {tuple(weight.shape)} has a larger rank than {self.rank}")
        root = size[: self.rank].sqrt()
        return (left[:, : self.rank] * root).to(weight), (root[:, None] * right[: self.rank]).to(weight)


@contextlib.contextmanager
def low_rank(rank: int) -> Iterator[None]:
    """While it lasts, `headfuse.uptrain` trains `k_proj` and `v_proj` as products of factors of this rank."""
    prepare = uptrain.prepare_training

    def prepare_factors(student: Any, recipe: Any) -> Callable[[], None]:
        projections = [m for name, m in student.named_modules() if name.endswith(("k_proj", "v_proj"))]
        for projection in projections:
            parametrize.register_parametrization(projection, "weight", Product(rank))
        merge = prepare(student, recipe)

        def merge_factors() -> None:
            merge()
            for projection in projections:
                parametrize.remove_parametrizations(projection, "weight")

        return merge_factors

    with mock.patch.object(uptrain, "prepare_training", prepare_factors):
        yield
