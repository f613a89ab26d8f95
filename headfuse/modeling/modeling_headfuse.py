"""Models whose layers have their own numbers of key heads and of value heads (Decoupled-Head Attention, 2406.06567).

A model is the stock transformers class of the source's family; only its attention modules are replaced.
This file is shipped beside the weights, so it imports only torch, transformers and the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_headfuse import FAMILIES, HeadfuseConfig


class HeadfuseAttention(nn.Module):
    """Attention with `nk` key heads and `nv` value heads, and a free map from the `n_q` query heads to each.

    An instance is a stock attention module whose class was made a subclass of this one: its norms, scaling, dropout,
    query projection and output projection stay as they are.
    """

    config: HeadfuseConfig
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    sliding_window: int | None
    num_key_value_groups: int
    cache_heads: int
    key_heads: torch.Tensor | None
    value_heads: torch.Tensor | None
    query_slots: torch.Tensor | None
    score_slots: torch.Tensor | None
    output_slots: torch.Tensor | None
    key_frequencies: torch.Tensor | None
    query_frequencies: torch.Tensor | None

    def decouple(self, config: HeadfuseConfig) -> None:
        """Give a stock attention module, whose class has just become this one, the heads of its layer."""
        num_keys, num_values = config.num_key_heads[self.layer_idx], config.num_value_heads[self.layer_idx]
        for name, num_heads in (("k_proj", num_keys), ("v_proj", num_values)):
            stock = getattr(self, name)
            resized = nn.Linear(
                stock.in_features,
                num_heads * self.head_dim,
                bias=stock.bias is not None,
                device=stock.weight.device,
                dtype=stock.weight.dtype,
            )
            setattr(self, name, resized)
        self.cache_heads = math.gcd(num_keys, num_values)
        if not hasattr(self, "sliding_window"):
            self.sliding_window = getattr(config, "sliding_window", None)
        self.num_key_value_groups, tables = self._tables()
        for name, table in tables.items():
            self.register_buffer(name, None if table is None else torch.tensor(table), persistent=False)

    def _tables(self) -> tuple[int, dict[str, list[Any] | None]]:
        """Query heads that share one expanded key and value head, and the index buffers (None = nothing to do)."""
        key_map = list(self.config.key_head_of_query[self.layer_idx])
        value_map = list(self.config.value_head_of_query[self.layer_idx])
        num_queries = len(key_map)
        # Expanded heads: one for each run of `group` query heads within which neither map changes.
        group = math.gcd(num_queries, *_changes(key_map), *_changes(value_map))
        # One query: query heads sorted by key head and by value head, the groups padded to the largest.
        by_key, by_value = _slots(key_map), _slots(value_map)
        slots = self.config.rotary_slots and self.config.rotary_slots[self.layer_idx]
        return group, {
            "key_heads": _index(key_map[::group], max(key_map) + 1),
            "value_heads": _index(value_map[::group], max(value_map) + 1),
            "query_slots": _index(by_key, num_queries),
            "score_slots": _index([by_key.index(query) for query in by_value], len(by_key)),
            "output_slots": _index([by_value.index(query) for query in range(num_queries)], len(by_value)),
            "key_frequencies": [list(head) for head in slots] if slots else None,
            "query_frequencies": [list(slots[head]) for head in key_map] if slots else None,
        }

    def reset_tables(self) -> None:
        """Write the index buffers, which loading on the meta device leaves undefined."""
        for name, table in self._tables()[1].items():
            if table is not None:
                getattr(self, name).copy_(torch.tensor(table))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states` [batch, length, hidden] to themselves and to the cache."""
        batch, length, _ = hidden_states.shape
        heads = (batch, length, -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
        value = self.v_proj(hidden_states)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, *position_embeddings, self.query_frequencies).transpose(1, 2)
        key = rotate(key, *position_embeddings, self.key_frequencies)

        # Static caches size both buffers by one head count: there neighbouring heads share a row of the cache.
        static = past_key_values is not None and past_key_values.is_compileable
        folded = (batch, length, self.cache_heads, -1) if static else heads
        key, value = key.reshape(folded).transpose(1, 2), value.reshape(folded).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if self._reads_once(length, attention_mask):
            output, weights = self._attend_once(query, key, value, attention_mask)
        else:
            attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            output, weights = attention_interface(
                self,
                query,
                _select(_unfold(key, self.head_dim), self.key_heads),
                _select(_unfold(value, self.head_dim), self.value_heads),
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
        output_proj = getattr(self, FAMILIES[self.config.source_config.model_type])
        return output_proj(output.reshape(batch, length, -1).contiguous()), weights

    def _reads_once(self, length: int, attention_mask: torch.Tensor | None) -> bool:
        return (
            length == 1
            and self.config._attn_implementation in ("eager", "sdpa")
            and not (self.training or torch.is_grad_enabled())
            and (attention_mask is None or attention_mask.shape[1] == 1)
        )

    def _attend_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one query per head, which reads every cached key and value once.

        `query` [b, n_q, 1, d], folded `key` and `value`, mask [b, 1, 1, s] (bool, additive or None) to the output
        [b, n_q, d] and, for "eager", the attention weights [b, n_q, 1, s].
        """
        grouped = _select(query.squeeze(2), self.query_slots)
        scores = _select(_grouped_product(grouped, _heads(key, self.head_dim, transpose=True)), self.score_slots)
        scores = scores.float() * self.scaling
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask[:, 0], torch.finfo(scores.dtype).min)
        elif attention_mask is not None:
            scores = scores + attention_mask[:, 0]
        weights = scores.softmax(dim=-1).to(query.dtype)
        output = _grouped_product(weights, _heads(value, self.head_dim))
        if self.config._attn_implementation != "eager":
            return _select(output, self.output_slots), None
        return _select(output, self.output_slots), _select(weights, self.output_slots).unsqueeze(2)


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frequencies: torch.Tensor | None
) -> torch.Tensor:
    """Rotary embedding, half style: slot s is the plane of channels (s, s + p) and stock RoPE turns it at frequency s.

    Args:
        states: [b, s, n, d]; channels from 2 p on are not rotated.
        cos: [b, s, 2 p], two equal halves, from the model's own rotary embedding.
        sin: likewise.
        frequencies: None for the stock order, or [n, p]: the frequency that each slot of each head carries.
    """
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    if frequencies is None:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    else:
        cos, sin = cos[..., frequencies], sin[..., frequencies]
    first, second, rest = states.split([half, half, states.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _changes(heads: list[int]) -> list[int]:
    """Positions at which a map changes."""
    return [i for i in range(1, len(heads)) if heads[i] != heads[i - 1]]


def _slots(heads: list[int]) -> list[int]:
    """Query heads sorted by the head that they read; smaller groups repeat a member."""
    groups = [[query for query, read in enumerate(heads) if read == head] for head in range(max(heads) + 1)]
    size = max(map(len, groups))
    return [query for group in groups for query in group + group[:1] * (size - len(group))]


def _index(table: list[int], num_source: int) -> list[int] | None:
    return None if table == list(range(num_source)) else table


def _select(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return states if index is None else states.index_select(1, index)


def _unfold(folded: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[b, h, s, r d] -> [b, h r, s, d]."""
    return folded.unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(1, 2)


def _heads(folded: torch.Tensor, head_dim: int, transpose: bool = False) -> tuple[torch.Tensor, ...]:
    """Views that a batched product reads without a copy: [b, h, s, r d] -> r times [b, h, s, d], or [b, h, d, s].

    A single [b, h r, s, d] is one only if b h = 1; else its batch and heads are not a stride apart.
    """
    heads = (_unfold(folded, head_dim),) if folded.shape[:2] == (1, 1) else folded.split(head_dim, dim=-1)
    return tuple(head.mT if transpose else head for head in heads)


def _grouped_product(rows: torch.Tensor, heads: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Product of `rows` [b, h r g, i] with the head of their group: r views [b, h, i, j] -> [b, h r g, j]."""
    batch, num_rows, size = rows.shape
    rows = rows.view(batch, heads[0].shape[1], len(heads), -1, size)
    return torch.stack([rows[:, :, i] @ head for i, head in enumerate(heads)], dim=2).view(batch, num_rows, -1)


@cache
def _specialise(cls: type, stock: type) -> type:
    """A class that is both `cls` and `stock`, with the name of `cls` in files and its own name in registries."""
    names = {"__module__": cls.__module__, "__qualname__": f"{cls.__name__}[{stock.__name__}]"}
    return type(cls.__name__, (cls, stock), {**names, "stock_class": stock})


class HeadfusePreTrainedModel(PreTrainedModel):
    """What the base model and the causal LM share: constructing one gives a subclass of the family's stock class."""

    config_class = HeadfuseConfig
    stock_class: ClassVar[type | None] = None
    stock_classes: ClassVar[Any] = MODEL_MAPPING

    def __new__(cls, config: HeadfuseConfig | None = None, *args: Any, **kwargs: Any) -> HeadfusePreTrainedModel:
        """Pick the subclass of the source's family."""
        model_class: Any = cls
        if cls.stock_class is None:
            # not isinstance: as remote code, each of the two files may be loaded with a HeadfuseConfig of its own
            if config is None or config.model_type != HeadfuseConfig.model_type:
                raise TypeError(f"{cls.__name__} needs a HeadfuseConfig, not {type(config).__name__}")
            model_class = _specialise(model_class, cls.stock_classes[type(config.source_config)])
        return super().__new__(model_class)

    def __init__(self, config: HeadfuseConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for layer in self.base_model.layers:
            layer.self_attn.__class__ = _specialise(HeadfuseAttention, layer.self_attn.__class__)
            layer.self_attn.decouple(config)
        self.post_init()

    def initialize_weights(self) -> None:
        """Initialise what was not loaded, index buffers included."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, HeadfuseAttention):
                module.reset_tables()

    def _get_static_cache_init_shape(self) -> None:
        """No common shape: static caches take each layer's from its first states."""


class HeadfuseModel(HeadfusePreTrainedModel):
    """The decoder without the language-model head."""


class HeadfuseForCausalLM(HeadfusePreTrainedModel, GenerationMixin):
    """The causal language model."""

    stock_classes = MODEL_FOR_CAUSAL_LM_MAPPING
