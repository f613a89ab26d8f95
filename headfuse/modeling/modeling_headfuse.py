"""Models whose layers have their own numbers of key heads and of value heads (Decoupled-Head Attention, 2406.06567).

A model is the stock transformers class of the source's family; only its attention modules are replaced.
This file is shipped beside the weights, so it imports only torch, transformers and the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, Cache, GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as attention_with_sinks

from .configuration_headfuse import HeadfuseConfig
from .modeling_decode_step import (
    Sizes,
    grouped_product,
    index_of,
    pads,
    probabilities,
    rows_by_head,
    score,
    select,
    unfold,
)
from .modeling_one_head import as_one_head, check_attention, check_runtime, from_places, in_places
from .modeling_stock import FusedPreTrainedModel, StockAttention, check_no_cache, with_bias


class HeadfuseAttention(StockAttention):
    """Attention with `nk` key heads and `nv` value heads, and a free map from the `n_q` query heads to each."""

    config: HeadfuseConfig
    num_key_value_groups: int
    cache_heads: int
    key_heads: torch.Tensor | None
    value_heads: torch.Tensor | None
    key_places: torch.Tensor
    value_places: torch.Tensor
    sizes: tuple[Sizes, Sizes]
    padded_sizes: tuple[Sizes, Sizes]
    query_rows: torch.Tensor | None
    score_rows: torch.Tensor | None
    output_rows: torch.Tensor | None
    padded_query_rows: torch.Tensor | None
    padded_score_rows: torch.Tensor | None
    padded_output_rows: torch.Tensor | None
    frequencies: torch.Tensor | None

    def decouple(self, config: HeadfuseConfig) -> None:
        """Give a stock attention module, whose class has just become this one, the heads of its layer."""
        num_keys, num_values = config.num_key_heads[self.layer_idx], config.num_value_heads[self.layer_idx]
        self.adopt(config)
        self.replace_projections(num_keys * self.head_dim, num_values * self.head_dim)
        self._fit_norm(num_keys)
        self.cache_heads = math.gcd(num_keys, num_values)
        self.num_key_value_groups, tables = self._tables()
        for name, table in tables.items():
            self.register_buffer(name, None if table is None else torch.tensor(table), persistent=False)

    def _tables(self) -> tuple[int, dict[str, list[int] | None]]:
        """Query heads that share one expanded key and value head, and the index buffers (None = nothing to do)."""
        key_map = list(self.config.key_head_of_query[self.layer_idx])
        value_map = list(self.config.value_head_of_query[self.layer_idx])
        # Expanded heads: one for each run of `group` query heads within which neither map changes.
        pairs = list(zip(key_map, value_map, strict=True))
        group = math.gcd(len(pairs), *(i for i in range(1, len(pairs)) if pairs[i] != pairs[i - 1]))
        self.sizes, self.padded_sizes, rows = rows_by_head(key_map, value_map)
        slots = self.config.rotary_slots and self.config.rotary_slots[self.layer_idx]
        stride = 2 if self.family.rotary == "interleaved" else 1
        planes = [[stride * f for f in head] for head in slots] if slots else []
        return group, {
            "key_heads": index_of(key_map[::group], max(key_map) + 1),
            "value_heads": index_of(value_map[::group], max(value_map) + 1),
            "key_places": key_map,
            "value_places": value_map,
            **rows,
            # of all query heads, then of all key heads
            "frequencies": [f for head in (*key_map, *range(len(planes))) for f in planes[head]] if slots else None,
        }

    def reset_tables(self) -> None:
        """Write the index buffers, which loading on the meta device leaves undefined."""
        for name, table in self._tables()[1].items():
            if table is not None:
                getattr(self, name).copy_(torch.tensor(table))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        alibi: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states` [batch, length, hidden] to themselves and to the cache.

        The cache has one of three names, by the family and the version of transformers.

        Raises:
            TypeError: for a cache under any other name, which would be ignored.
            NotImplementedError: as `check_runtime`.
        """
        check_runtime(self.config)
        check_no_cache(kwargs)
        one_head = self.config._attn_implementation == "vllm"
        residual = None
        if isinstance(position_embeddings, torch.Tensor):  # bloom hands over its residual stream in this place
            residual, position_embeddings = position_embeddings, None
        cache = next((one for one in (cache, past_key_values, layer_past) if one is not None), None)
        batch, length, _ = hidden_states.shape
        if not self.rotates:
            position_embeddings = None
        elif position_embeddings is None:
            sin, cos = self.embed_positions[position_ids].chunk(2, dim=-1)
            position_embeddings = sin, cos
        query, key, value = self._laid_out(*self._states(hidden_states, position_embeddings), cache)
        key, value = self._with_past(key, value, cache)

        if alibi is not None:
            attention_mask = with_bias(
                alibi.unflatten(0, (-1, self.config.num_attention_heads)), attention_mask, length
            )
        if self._reads_once(length, key.shape[2], attention_mask):
            output, weights = self.attend_once(query, key, value, attention_mask)
        else:
            attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation,
                eager_attention_forward if self.sinks is None else attention_with_sinks,
            )
            options = {"softcap": self.softcap, "s_aux": self.sinks}
            output, weights = attention_interface(
                self,
                query,
                *((key, value) if one_head else self._expanded(key, value)),
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **{name: option for name, option in options.items() if option is not None},
                **kwargs,
            )
            if one_head:
                output = self._from_one_head(output.reshape(batch, length, self.config.num_attention_heads, -1))
        output = getattr(self, self.family.output)(output.reshape(batch, length, -1).contiguous())
        output = nn.functional.dropout(output, self.residual_dropout, self.training)
        return output if residual is None else residual + output, weights

    def _with_past(
        self, key: torch.Tensor, value: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of all positions, given those to cache."""
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)

    def _states(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [b, s, heads, d], rotated."""
        query, key, value = self._project(hidden_states)
        turn = None if position_embeddings is None else self._cos_and_sin(position_embeddings)
        return *self._turned(query, key, turn), value

    def _turned(
        self, query: torch.Tensor, key: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [b, s, heads, d] rotated by a cos and a sin, and behind norms that stand there."""
        if turn is not None:
            both = rotate(torch.cat((query, key), dim=2), *turn)  # in one go: a decode step is bound by calls
            query, key = both.split([query.shape[2], key.shape[2]], dim=2)
        if self.family.norm_after_rotary:
            query, key = self._normed(query, 0), self._normed(key, 1)
        return query, key

    def _cache_shape(self, cache: Cache | None) -> tuple[int, int]:
        """Heads and channels of a row in the cache; -1 means the rest.

        Static caches size both buffers by one head count: there neighbouring heads share a row of the cache.
        """
        static = cache is not None and cache.is_compileable
        return (self.cache_heads, -1) if static else (-1, self.head_dim)

    def _expanded(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cached keys and values as attention functions read them: one head for equal numbers of query heads."""
        return (
            select(unfold(key, self.head_dim), self.key_heads),
            select(unfold(value, self.head_dim), self.value_heads),
        )

    def _laid_out(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the states [b, s, heads, d] queries [b, n_q, s, ..], and keys and values as they are cached."""
        if self.config._attn_implementation == "vllm":
            check_attention(self)
            return self._as_one_head(query, key, value)
        folded = (*query.shape[:2], *self._cache_shape(cache))
        return query.transpose(1, 2), key.reshape(folded).transpose(1, 2), value.reshape(folded).transpose(1, 2)

    def _as_one_head(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the states [b, s, heads, d] queries [b, n_q, s, w], and one key and one value [b, 1, s, w]."""
        width = self.config.one_head_widths[self.layer_idx]
        query = in_places(query, self.key_places, width).transpose(1, 2)
        return query, as_one_head(key, width), as_one_head(value, width)

    def _from_one_head(self, output: torch.Tensor) -> torch.Tensor:
        """Outputs [b, s, n_q, d] of those of one head [b, s, n_q, w]."""
        return from_places(output, self.value_places, self.head_dim)

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [b, s, heads, d] before the rotation."""
        value = self.v_proj(hidden_states)
        if self.clip is not None:
            value = value.clamp(-self.clip, self.clip)
        value = value.unflatten(-1, (-1, self.head_dim))
        return self._heads(hidden_states, self.q_proj, 0), self._heads(hidden_states, self.k_proj, 1), value

    def _cos_and_sin(self, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Both in this order, as `_angles` gives them."""
        cos, sin = (self._angles(angles) for angles in position_embeddings)
        return (sin, cos) if self.family.rotary == "swapped" else (cos, sin)

    def _angles(self, angles: torch.Tensor) -> torch.Tensor:
        """The cos or sin as [b, s, 1 or heads, p]: of each slot of all query heads, then of key heads."""
        planes = angles.shape[-1] // (1 if self.family.rotary in ("once", "swapped") else 2)
        if self.frequencies is not None:
            return angles.index_select(-1, self.frequencies).unflatten(-1, (-1, planes))
        return (angles[..., ::2] if self.family.rotary == "interleaved" else angles[..., :planes]).unsqueeze(2)

    def _reads_once(self, length: int, num_cached: int, attention_mask: torch.Tensor | None) -> bool:
        if length != 1 or self.training or torch.is_grad_enabled():
            return False
        if self.config._attn_implementation in ("eager", "sdpa"):
            return attention_mask is None or attention_mask.shape[1] == 1
        # these apply the window themselves, and other masks have forms of their own
        is_flash = str(self.config._attn_implementation).startswith("flash_attention")
        return is_flash and attention_mask is None and (self.sliding_window or num_cached) >= num_cached

    def attend_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one query per head, which reads every cached key and value once.

        `query` [b, n_q, 1, d], folded `key` and `value`, mask [b, 1, 1, s] (bool, additive or None) to the output
        [b, n_q, d] and, for "eager", the attention weights [b, n_q, 1, s].
        """
        if pads(query.device, key.shape[2]):
            rows = self.padded_query_rows, self.padded_score_rows, self.padded_output_rows
            key_sizes, value_sizes = self.padded_sizes
        else:
            rows = self.query_rows, self.score_rows, self.output_rows
            key_sizes, value_sizes = self.sizes
        query = select(query * self.scaling, rows[0]).flatten(1, 2)
        scores = select(grouped_product(score, query, key, key_sizes, self.head_dim), rows[1])
        sinks = None if self.sinks is None else select(select(self.sinks[None], rows[0]), rows[1])[0]
        weights = probabilities(scores, attention_mask, self.softcap, sinks)
        output = select(grouped_product(torch.bmm, weights, value, value_sizes, self.head_dim), rows[2])
        wanted = self.config._attn_implementation == "eager"
        return output, select(weights, rows[2]).unsqueeze(2) if wanted else None


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: slot s of a head is the plane of channels (s, s + p).

    Args:
        states: [b, s, n, d]; channels from 2 p on are not rotated.
        cos: [b, s, 1 or n, p], of the frequency that each slot carries.
        sin: likewise.
    """
    planes = cos.shape[-1]
    first, second, rest = states.split([planes, planes, states.shape[-1] - 2 * planes], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(states.dtype)


class HeadfusePreTrainedModel(FusedPreTrainedModel):
    """What the base model and the causal LM share."""

    config_class = HeadfuseConfig
    attention_class: ClassVar[type] = HeadfuseAttention


class HeadfuseModel(HeadfusePreTrainedModel):
    """The decoder without the language-model head."""


class HeadfuseForCausalLM(HeadfusePreTrainedModel, GenerationMixin):
    """The causal language model."""

    stock_classes = MODEL_FOR_CAUSAL_LM_MAPPING
