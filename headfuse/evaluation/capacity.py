"""What a model and its KV cache weigh, and what fits into a given memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from headfuse.checkpoint.reader import Checkpoint
from headfuse.errors import ConfigError

FORMULA = "weight bytes + batch x context x KV bytes per token <= memory; activations and the runtime's own not counted"
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Fit:
    """What fits beside the weights: `longest_context` for one sequence, `largest_batch` of sequences of `context`.

    `longest_context` is what memory holds; `max_context` is what the model was made for, None where it does not say.
    """

    memory_bytes: int
    weight_bytes: int
    longest_context: int
    max_context: int | None
    context: int
    largest_batch: int


def parse_memory(text: str) -> int:
    """Bytes of `24GB` (10^9), `16GiB` (2^30), `500M` or a number of bytes.

    Raises:
        ValueError: for anything else.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size such as 24GB or 16GiB")
    return size


def fit(memory_bytes: int, weight_bytes: int, kv_bytes: int, context: int, max_context: int | None) -> Fit:
    """What fits by `FORMULA`.

    Raises:
        ConfigError: where the weights alone do not fit.
    """
    room = memory_bytes - weight_bytes
    if room < 0:
        raise ConfigError(
            f"{memory_bytes:,} bytes do not hold the weights of {weight_bytes:,}",
            where="--memory",
            fix="give the memory of one device that holds the whole model",
        )
    return Fit(memory_bytes, weight_bytes, room // kv_bytes, max_context, context, room // (kv_bytes * context))


def kv_bytes_per_token(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes that one token takes in the KV cache over all layers, at `itemsize` bytes a number."""
    if hasattr(config, "key_widths"):  # layout latent
        return sum(map(sum, (*config.key_widths, *config.value_widths))) * itemsize
    if config.model_type == "headfuse":
        heads = sum(config.num_key_heads) + sum(config.num_value_heads)
    elif hasattr(config, "num_key_value_heads_per_layer"):  # layout layerwise
        heads = 2 * sum(config.num_key_value_heads_per_layer)
    else:
        config = config.get_text_config()
        heads = (
            2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads * head_dim * itemsize


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most numbers of the weight files have."""
    sizes: Counter[torch.dtype] = Counter()
    for name, shape in checkpoint.shapes.items():
        sizes[checkpoint.dtypes[name]] += math.prod(shape)
    return sizes.most_common(1)[0][0]
