"""Models whose layers have their own numbers of key heads and of value heads (Decoupled-Head Attention, 2406.06567).

A model is the stock transformers class of the source's family; only its attention modules are replaced.
This file is shipped beside the weights, so it imports only torch, transformers and the standard library.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as attention_with_sinks

from .configuration_headfuse import Family, HeadfuseConfig, has_norm
from .modeling_one_head import as_one_head, check_attention, check_runtime, from_places, in_places


class HeadfuseAttention(nn.Module):
    """Attention with `nk` key heads and `nv` value heads, and a free map from the `n_q` query heads to each.

    An instance is a stock attention module whose class was made a subclass of this one: its norms, scaling, dropout
    and output projection stay as they are.
    """

    config: HeadfuseConfig
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    clip: float | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    k_norm: nn.Module
    family: Family
    residual_dropout: float
    norm: str | None
    softcap: float | None
    sinks: torch.Tensor | None
    rotates: bool
    embed_positions: torch.Tensor
    sliding_window: int | None
    num_key_value_groups: int
    cache_heads: int
    key_heads: torch.Tensor | None
    value_heads: torch.Tensor | None
    key_places: torch.Tensor
    value_places: torch.Tensor
    sizes: tuple[list[int] | int, list[int] | int]
    padded_sizes: tuple[list[int] | int, list[int] | int]
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

    def _fit_norm(self, num_keys: int) -> None:
        """Give the norm of keys as many weights as the layer has key heads, where each head has its own."""
        norm: Any = getattr(self, self.family.norm_names[1], None)
        if self.family.norm == "layer":
            self.k_norm = type(norm)(num_keys * self.head_dim, norm.variance_epsilon)
        elif hasattr(norm, "norms"):  # stablelm: a module for each head
            norm.norms = norm.norms[:num_keys]
        elif norm is not None and norm.weight.dim() == 2:  # cohere: a row for each head
            norm.weight = nn.Parameter(norm.weight[:num_keys].detach().clone())

    def adopt(self, config: Any) -> None:
        """Take what does not depend on the heads from the config and from the stock module."""
        self.config = config  # bloom's attention keeps none
        self.family = config.family
        self.head_dim = config.source_head_dim
        self.scaling = getattr(self, "scaling", self.head_dim**-0.5)
        rate = _dropout(self, "attention_dropout", "attn_dropout", "dropout")
        self._modules.pop("attention_dropout", None)  # bloom's is a module, and a number may not take its name
        self.attention_dropout = rate
        self.residual_dropout = _dropout(self, "residual_dropout", "resid_dropout", "hidden_dropout")
        self.clip = getattr(config, "clip_qkv", None)
        self.norm = self.family.norm if has_norm(config.source_config) else None
        self.softcap = getattr(self, "attn_logit_softcapping", None) if self.family.softcap else None
        self.sinks = getattr(self, "sinks", None)
        self.rotates = _rotates(self)
        if not hasattr(self, "sliding_window"):
            self.sliding_window = getattr(config, "sliding_window", None)
        if not getattr(self, "is_sliding", True):  # exaone4 keeps the width of other layers' windows
            self.sliding_window = None

    def replace_projections(self, key_width: int, value_width: int, whole_keys: bool = False) -> None:
        """Projections of the source's queries, and of so many channels of keys and of values; or of all its keys."""
        family, config = self.family, self.config
        if whole_keys:
            heads = getattr(config.source_config, "num_key_value_heads", None) or config.num_attention_heads
            key_width = heads * self.head_dim
            self._fit_norm(heads)  # vLLM makes the stock module for one head
        stock = getattr(self, family.packed or "q_proj")
        has_bias = stock.bias is not None
        widths = {"q_proj": config.num_attention_heads * self.head_dim, "k_proj": key_width, "v_proj": value_width}
        for name, width in widths.items():
            setattr(self, name, nn.Linear(config.hidden_size, width, bias=has_bias).to(stock.weight))
        if family.packed:
            delattr(self, family.packed)

    def _tables(self) -> tuple[int, dict[str, list[int] | None]]:
        """Query heads that share one expanded key and value head, and the index buffers (None = nothing to do)."""
        key_map = list(self.config.key_head_of_query[self.layer_idx])
        value_map = list(self.config.value_head_of_query[self.layer_idx])
        num_queries = len(key_map)
        # Expanded heads: one for each run of `group` query heads within which neither map changes.
        group = math.gcd(num_queries, *_changes(key_map), *_changes(value_map))
        # Within its group a query may stand anywhere: where groups nest, in order, no scores are moved.
        by_key = [sorted(group, key=value_map.__getitem__) for group in _groups(key_map)]
        order = [query for group in by_key for query in group]
        by_value = [sorted(group, key=order.index) for group in _groups(value_map)]
        self.sizes = _sizes(by_key), _sizes(by_value)
        self.padded_sizes = _sizes(_padded(by_key)), _sizes(_padded(by_value))
        slots = self.config.rotary_slots and self.config.rotary_slots[self.layer_idx]
        stride = 2 if self.family.rotary == "interleaved" else 1
        planes = [[stride * f for f in head] for head in slots] if slots else []
        return group, {
            "key_heads": _index(key_map[::group], max(key_map) + 1),
            "value_heads": _index(value_map[::group], max(value_map) + 1),
            "key_places": key_map,
            "value_places": value_map,
            **_rows("", by_key, by_value, num_queries),
            **_rows("padded_", _padded(by_key), _padded(by_value), num_queries),
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

    def _normed(self, states: torch.Tensor, side: int) -> torch.Tensor:
        """Queries (side 0) or keys (side 1) behind their norm."""
        norm: Any = getattr(self, self.family.norm_names[side])
        if hasattr(norm, "norms"):  # which takes [b, heads, s, d]
            return norm(states.transpose(1, 2)).transpose(1, 2)
        return norm(states)

    def _cache_shape(self, cache: Cache | None) -> tuple[int, int]:
        """Heads and channels of a row in the cache; -1 means the rest.

        Static caches size both buffers by one head count: there neighbouring heads share a row of the cache.
        """
        static = cache is not None and cache.is_compileable
        return (self.cache_heads, -1) if static else (-1, self.head_dim)

    def _expanded(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cached keys and values as attention functions read them: one head for equal numbers of query heads."""
        return (
            _select(_unfold(key, self.head_dim), self.key_heads),
            _select(_unfold(value, self.head_dim), self.value_heads),
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

    def _heads(self, hidden_states: torch.Tensor, projection: nn.Linear, side: int) -> torch.Tensor:
        """Queries (side 0) or keys (side 1) [b, s, heads, d] before the rotation, behind a norm that stands there."""
        states = projection(hidden_states)
        if self.norm == "layer":
            states = self._normed(states, side)
        if self.clip is not None:
            states = states.clamp(-self.clip, self.clip)
        states = states.unflatten(-1, (-1, self.head_dim))
        if self.norm == "head" and not self.family.norm_after_rotary:
            states = self._normed(states, side)
        return states

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
        if _pads(query.device, key.shape[2]):
            rows = self.padded_query_rows, self.padded_score_rows, self.padded_output_rows
            key_sizes, value_sizes = self.padded_sizes
        else:
            rows = self.query_rows, self.score_rows, self.output_rows
            key_sizes, value_sizes = self.sizes
        query = _select(query * self.scaling, rows[0]).flatten(1, 2)
        scores = _select(_grouped_product(score, query, key, key_sizes, self.head_dim), rows[1])
        sinks = None if self.sinks is None else _select(_select(self.sinks[None], rows[0]), rows[1])[0]
        weights = probabilities(scores, attention_mask, self.softcap, sinks)
        output = _select(_grouped_product(torch.bmm, weights, value, value_sizes, self.head_dim), rows[2])
        wanted = self.config._attn_implementation == "eager"
        return output, _select(weights, rows[2]).unsqueeze(2) if wanted else None


def probabilities(
    scores: torch.Tensor,
    attention_mask: torch.Tensor | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention weights of one query per head from scores [b, n_q, s] and a mask [b, 1, 1, s]: bool, additive, None.

    Scores may have a cap, and heads sinks [n_q], whose part of the weights is left out.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask[:, 0], torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask[:, 0]
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores)[:, None].expand(*scores.shape[:-1], 1)), dim=-1)
        return scores.softmax(dim=-1, dtype=torch.float32)[..., :-1].to(scores.dtype)
    return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)


def check_no_cache(arguments: dict[str, Any]) -> None:
    """Refuse a KV cache among arguments that are ignored: every step would attend to its own tokens alone.

    Raises:
        TypeError: naming the argument.
    """
    for name, value in arguments.items():
        named = "cache" in name or "past" in name  # cache_position and use_cache are no caches
        if isinstance(value, Cache) or (named and (hasattr(value, "update") or isinstance(value, list | tuple))):
            raise TypeError(
                f"layout decoupled: the KV cache comes as the argument {name!r}, which this model code does not know; "
                "use transformers 5.16.1 to 5.24, or refresh the code with `headfuse export FOLDER --refresh`"
            )


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


def with_bias(bias: torch.Tensor, mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """Biases of query heads [b, n_q, 1, s] and a mask (bool, additive or None: causal) as one mask [b, n_q, t, s]."""
    if mask is None:
        positions = torch.arange(bias.shape[-1], device=bias.device)
        mask = (positions <= positions[-length:, None])[None, None]
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _rotates(attention: Any) -> bool:
    """Whether RoPE turns the queries and keys of a layer, which may depend on its window."""
    family, window = attention.family, getattr(attention, "sliding_window", None)
    if family.rotary == "none" or not getattr(attention, "use_rope", True):
        return False
    if not family.rotates_in_windows:
        return True
    return bool(window is None or attention.is_sliding) if hasattr(attention, "is_sliding") else window is not None


def _dropout(attention: nn.Module, *names: str) -> float:
    """The rate of the dropout that a stock attention has under one of these names, as a number or as a module."""
    rates = (getattr(attention, name, None) for name in names)
    rate = next((rate for rate in rates if rate is not None), 0.0)
    return float(getattr(rate, "p", rate))


def _changes(heads: list[int]) -> list[int]:
    """Positions at which a map changes."""
    return [i for i in range(1, len(heads)) if heads[i] != heads[i - 1]]


def _groups(heads: list[int]) -> list[list[int]]:
    """The query heads that read each head."""
    return [[query for query, read in enumerate(heads) if read == head] for head in range(max(heads) + 1)]


def _pads(device: torch.device, num_cached: int) -> bool:
    """Whether one product over groups of one size beats a smaller one per head: where calls cost more than numbers."""
    return device.type != "cpu" or num_cached < 1024


def _padded(groups: list[list[int]]) -> list[list[int]]:
    """Groups of one size: smaller ones repeat a member."""
    return [group + group[:1] * (max(map(len, groups)) - len(group)) for group in groups]


def _sizes(groups: list[list[int]]) -> list[int] | int:
    """Of each group, or the one of all."""
    sizes = list(map(len, groups))
    return sizes if len(set(sizes)) > 1 else sizes[0]


def _rows(prefix: str, by_key: list[list[int]], by_value: list[list[int]], num_queries: int) -> dict[str, Any]:
    """Which rows to take for the queries sorted by key head, then for the scores by value head, then for the output."""
    keys, values = ([query for group in groups for query in group] for groups in (by_key, by_value))
    return {
        f"{prefix}query_rows": _index(keys, num_queries),
        f"{prefix}score_rows": _index([keys.index(query) for query in values], len(keys)),
        f"{prefix}output_rows": _index([values.index(query) for query in range(num_queries)], len(values)),
    }


def _index(table: list[int], num_source: int) -> list[int] | None:
    return None if table == list(range(num_source)) else table


def _select(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return states if index is None else states.index_select(1, index)


def _unfold(folded: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[b, h, s, r d] -> [b, h r, s, d]."""
    return folded.unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(1, 2)


def score(rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[b, g, d] and keys [b, s, d] to [b, g, s].

    For some g a CPU multiplies up to 3 times faster in the other order, if keys lie one behind the other.
    """
    length, head_dim = head.shape[1:]
    fewest = 2 if head_dim >= 128 else 4 if head_dim >= 64 and length >= 2048 else 10
    turned = fewest <= rows.shape[1] <= 9 and head.stride(1) == head_dim
    return torch.bmm(head, rows.mT).mT if turned else torch.bmm(rows, head.mT)


def _grouped_product(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    folded: torch.Tensor,
    sizes: list[int] | int,
    head_dim: int,
) -> torch.Tensor:
    """Product of each group of rows with its own head, which is read where it lies.

    Args:
        product: of rows [b, g, i] and a head [b, s, d].
        rows: [b, sum of sizes, i].
        folded: [b, h, s, r d], the heads 0 to h r - 1.
        sizes: rows of each head, or the one number of all.
        head_dim: d.

    Returns:
        [b, sum of sizes, j]
    """
    batch, num_rows, width = rows.shape
    if isinstance(sizes, list):
        groups = rows.split(sizes, dim=1)
        return torch.cat([product(*pair) for pair in zip(groups, _heads(folded, head_dim), strict=True)], dim=1)
    if folded.shape[3] == head_dim:
        head = folded.flatten(0, 1)
        return product(rows.reshape(head.shape[0], sizes, width), head).reshape(batch, num_rows, -1)
    if folded.shape[:2] == (1, 1):  # one view of all heads exists if nothing else lies between them
        return product(rows.reshape(-1, sizes, width), _unfold(folded, head_dim)[0]).reshape(batch, num_rows, -1)
    views = folded.split(head_dim, dim=-1)
    rows = rows.reshape(-1, len(views), sizes, width)
    products = [product(rows[:, i], view.flatten(0, 1)) for i, view in enumerate(views)]
    return torch.stack(products, dim=1).reshape(batch, num_rows, -1)


def _heads(folded: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """The heads [b, s, d]."""
    rows = folded.unbind(1)
    return list(rows) if folded.shape[3] == head_dim else [head for row in rows for head in row.split(head_dim, dim=-1)]


@functools.cache
def _specialise(cls: type, stock: type) -> type:
    """A class that is both `cls` and `stock`, with the name of `cls` in files and its own name in registries."""
    names = {"__module__": cls.__module__, "__qualname__": f"{cls.__name__}[{stock.__name__}]"}
    return type(cls.__name__, (cls, stock), {**names, "stock_class": stock, "__reduce_ex__": _reduce})


def _reduce(module: Any, protocol: Any) -> Any:
    """How pickle stores an instance of a specialised class, which no module holds under a name: by both its bases."""
    stored = object.__reduce_ex__(module, protocol)
    made = type(module)  # or a further subclass, which has to be importable itself
    return (_empty, made.__bases__, *stored[2:]) if "__reduce_ex__" in vars(made) else stored


def _empty(cls: type, stock: type) -> Any:
    """An instance of a specialised class without its state, which pickle fills in."""
    specialised: Any = _specialise(cls, stock)
    return specialised.__new__(specialised)


class HeadfusePreTrainedModel(PreTrainedModel):
    """What the base model and the causal LM share: constructing one gives a subclass of the family's stock class."""

    config_class = HeadfuseConfig
    attention_class: ClassVar[type] = HeadfuseAttention
    stock_class: ClassVar[type | None] = None
    stock_classes: ClassVar[Any] = MODEL_MAPPING

    def __new__(cls, config: HeadfuseConfig | None = None, *args: Any, **kwargs: Any) -> HeadfusePreTrainedModel:
        """Pick the subclass of the source's family."""
        model_class: Any = cls
        if cls.stock_class is None:
            # not isinstance: as remote code, each of the two files may be loaded with a HeadfuseConfig of its own
            if config is None or config.model_type != cls.config_class.model_type:
                wanted = cls.config_class.__name__
                raise TypeError(f"{cls.__name__} needs a {wanted}, not {type(config).__name__}")
            model_class = _specialise(model_class, cls.stock_classes[type(config.source_config)])
            if config.family.softcap:  # which sdpa leaves out
                model_class._supports_sdpa = False
        return super().__new__(model_class)

    def __init__(self, config: HeadfuseConfig, *args: Any, **kwargs: Any) -> None:
        check_runtime(config)
        super().__init__(config, *args, **kwargs)
        for layer in self.base_model.get_submodule(config.family.layers):
            attention = getattr(layer, config.family.attention)
            attention.__class__ = _specialise(self.attention_of(config, attention.layer_idx), attention.__class__)
            attention.decouple(config)
        self.post_init()

    def attention_of(self, config: Any, layer_idx: int) -> type:
        """The class of a layer's attention."""
        return self.attention_class

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
