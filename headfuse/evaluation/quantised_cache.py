"""Simulates a quantised KV cache: a model reads its keys and values as a cache with few bits would return them.

Every state is rounded when it is cached, token by token and head by head, and every query reads rounded states, those
of its own token included: so vLLM reads its cache of fp8 or int8. transformers' `QuantizedCache` instead hands the
states of its first call back as they are, so that one pass over a text would measure nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from headfuse.choices import CacheDtype
from headfuse.errors import UnsupportedModelError
from headfuse.models.states import cache_argument

GROUP = 64
"""Channels that share a scale; a head with more channels has several groups."""
_BITS: dict[str, int] = {"fp8": 8, "int8": 8, "int4": 4, "int3": 3, "int2": 2}
_SCALE = torch.float16
_TINY = 2.0**-24
"""The smallest float16 above zero."""
_LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of a token in a cache: the numbers, and the scales and offsets stored with them."""

    numbers: int
    scales: int


def stored_bytes(width: int, dtype: CacheDtype) -> StoredBytes:
    """Bytes of one head of `width` channels: groups are packed into whole bytes, scales are float16."""
    groups = [min(GROUP, width - start) for start in range(0, width, GROUP)]
    per_group = _SCALE.itemsize * (1 if dtype == "fp8" else 2)
    return StoredBytes(sum(math.ceil(size * _BITS[dtype] / 8) for size in groups), per_group * len(groups))


def rounded(states: torch.Tensor, dtype: CacheDtype) -> torch.Tensor:
    """Keys or values `[..., width]` as the cache gives them back, in their own dtype.

    Each group of channels of a token is rounded by itself: `fp8` to e4m3 numbers times a scale that puts the largest at
    448; `intN` to one of 2^N values in equal steps from the smallest number to the largest.
    """
    if not states.numel():  # of a layer that caches nothing on this side
        return states
    of_group = _rounded_fp8 if dtype == "fp8" else _rounded_int
    parts = [of_group(part.float(), _BITS[dtype]) for part in states.split(GROUP, dim=-1)]
    return torch.cat(parts, dim=-1).to(states.dtype)


def _rounded_int(group: torch.Tensor, bits: int) -> torch.Tensor:
    levels = 2**bits - 1
    lowest = _stored(group.amin(dim=-1, keepdim=True))
    step = _stored((group.amax(dim=-1, keepdim=True) - lowest) / levels).clamp_min(_TINY)
    return lowest + ((group - lowest) / step).round().clamp(0, levels) * step


def _rounded_fp8(group: torch.Tensor, bits: int) -> torch.Tensor:
    scale = _stored(group.abs().amax(dim=-1, keepdim=True) / _LARGEST_FP8).clamp_min(_TINY)
    numbers = (group / scale).clamp(-_LARGEST_FP8, _LARGEST_FP8)  # beyond, a conversion gives no number
    return numbers.to(torch.float8_e4m3fn).float() * scale


def _stored(scale: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(_SCALE).max
    return scale.clamp(-limit, limit).to(_SCALE).float()


def described(dtype: CacheDtype) -> str:
    """The protocol in words."""
    scales = "a scale" if dtype == "fp8" else "the smallest number and a step"
    return (
        f"KV cache in {dtype}, simulated: keys and values are rounded as they are cached, those of the token itself"
        f" included, per token and head in groups of up to {GROUP} channels, each with {scales} in float16"
    )


class QuantisedCache(DynamicCache):
    """A cache of rounded states; `widths` is `[heads, channels]` of each layer's keys and values."""

    def __init__(self, config: PreTrainedConfig, dtype: CacheDtype) -> None:
        super().__init__(config=config)
        self.dtype = dtype
        self.widths: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round states `[batch, heads, tokens, channels]`, cache them, and give all rounded ones back."""
        key, value = key_states.shape, value_states.shape
        self.widths[layer_idx] = (key[1], key[3]), (value[1], value[3])
        states = rounded(key_states, self.dtype), rounded(value_states, self.dtype)
        cached: tuple[torch.Tensor, torch.Tensor] = super().update(*states, layer_idx, *args, **kwargs)
        return cached


@dataclass
class QuantisedCaches:
    """Makes every later call of a model use a `QuantisedCache`."""

    model: PreTrainedModel
    dtype: CacheDtype
    last: QuantisedCache | None = field(default=None, init=False)
    """The newest cache that was made."""

    def __post_init__(self) -> None:
        self._name = cache_argument(self.model.base_model)
        self.model.base_model.register_forward_pre_hook(self._give, with_kwargs=True)

    def _give(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache: Cache | None = kwargs.get(self._name)
        if isinstance(cache, QuantisedCache):
            return args, kwargs
        if cache is not None and cache.get_seq_length():
            raise TypeError("states that are not quantised are in the cache already")
        self.last = QuantisedCache(self.model.config, self.dtype)
        return args, {**kwargs, self._name: self.last, "use_cache": True}

    def bytes_per_token(self) -> StoredBytes:
        """Bytes of a token over all layers, by the shapes that the model cached.

        Raises:
            UnsupportedModelError: where it has cached none in this way.
        """
        if self.last is None or not self.last.widths:
            raise UnsupportedModelError(
                "its layers cache nothing through transformers' Cache.update",
                where="--cache-dtype",
                fix="leave --cache-dtype out for this model",
            )
        parts = [
            (heads, stored_bytes(width, self.dtype)) for both in self.last.widths.values() for heads, width in both
        ]
        return StoredBytes(sum(n * one.numbers for n, one in parts), sum(n * one.scales for n, one in parts))
