"""Bytes of a model and of its KV cache, and what fits into a given memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from headfuse.checkpoint.reader import Checkpoint

FORMULA = "weight bytes + batch x context x KV bytes per token <= memory; activations and the runtime's own not counted"


@dataclass(frozen=True)
class Fit:
    """What fits beside the weights: `longest_context` for one sequence, `largest_batch` of sequences of `context`.

    `longest_context` is what memory holds. `max_context` is the model's own limit, None if its config names none.
    """

    memory_bytes: int
    weight_bytes: int
    longest_context: int
    max_context: int | None
    context: int
    largest_batch: int


def fit(memory_bytes: int, weight_bytes: int, kv_bytes: int, context: int, max_context: int | None) -> Fit:
    """The longest context and the largest batch that fit by `FORMULA`: 0 where the weights alone do not fit."""
    room = max(0, memory_bytes - weight_bytes)
    return Fit(memory_bytes, weight_bytes, room // kv_bytes, max_context, context, room // (kv_bytes * context))


def shortage(memory_bytes: int, weight_bytes: int) -> str | None:
    """In words that the weights alone do not fit; None where they do."""
    if memory_bytes >= weight_bytes:
        return None
    return f"{memory_bytes:,} bytes are too few for {weight_bytes:,} bytes of weights"


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most numbers of the weight files have."""
    sizes: Counter[torch.dtype] = Counter()
    for name, shape in checkpoint.shapes.items():
        sizes[checkpoint.dtypes[name]] += math.prod(shape)
    return sizes.most_common(1)[0][0]
