"""Models that cache wide heads: one key and one value for a whole group of source heads, read by all its query heads.

A group caches a key of S rotary slots, each a complex combination of one frequency of the source's keys, and a value of
r channels. Read maps give the source's heads back: RoPE stays exact, as a slot turns with its frequency.
This file is shipped beside the weights, so it imports only torch, transformers and the standard library.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, Cache, GenerationMixin

from .configuration_latent import LatentConfig
from .modeling_cross_layer import ReadingAttention, SharingAttention, read_parameter
from .modeling_decode_step import probabilities, score
from .modeling_headfuse import rotate
from .modeling_one_head import as_one_head
from .modeling_shared_states import SharedStates, checkpointing_options
from .modeling_stock import FusedPreTrainedModel


class Group(NamedTuple):
    """Where the parts of a group lie: channels of the cache and rows of the read maps."""

    heads: list[int]
    """The source heads."""
    slots: int
    """Rotary slots of the cached key."""
    key: slice
    """Channels of the cached key: the first ones of all slots, the second ones, those that are not rotated."""
    value: slice
    """Channels of the cached value."""
    rotated: slice
    """Slots of the layer; `heads * slots` rows of `key_read`."""


class LatentAttention(SharingAttention):
    """Attention whose cache holds one wide key and one wide value per group of source heads.

    Parameters besides the projections, rows in the order of (group, source head of the group, channel of the cache):
    `key_read` [rows, 2], the complex factor with which a source head reads a slot; `key_read_plain` [rows, d - 2 p] and
    `value_read` [rows, d], what a channel of the cache adds to the source head's key and value. Write maps, where keys
    stand behind a norm, are those of SharingAttention.
    """

    groups: list[Group]
    key_read: nn.Parameter | None
    key_read_plain: nn.Parameter | None
    value_read: nn.Parameter
    head_order: torch.Tensor | None
    frequencies: Any

    def decouple(self, config: Any) -> None:
        """Give a stock attention module, whose class has just become this one, the groups of its layer."""
        self.adopt(config)
        layer = self.layer_idx
        groups, key_widths = config.groups[layer], config.key_widths[layer]
        value_widths, slots = config.value_widths[layer], config.rotary_slots[layer]
        self.replace_projections(sum(key_widths), sum(value_widths), whole_keys=self.norm is not None)
        self.num_planes = config.rotary_planes(layer)
        heads = sum(map(len, groups))
        self.num_key_value_groups = config.num_attention_heads // heads
        self.groups, key, value, slot = [], 0, 0, 0
        for members, key_width, value_width, table in zip(groups, key_widths, value_widths, slots, strict=True):
            place = slice(key, key := key + key_width), slice(value, value := value + value_width)
            self.groups.append(Group(list(members), len(table), *place, slice(slot, slot := slot + len(table))))
        like = self.v_proj.weight
        sizes = [(len(group.heads), group) for group in self.groups]
        plain = [n * (g.key.stop - g.key.start - 2 * g.slots) for n, g in sizes]
        rotated = sum(n * g.slots for n, g in sizes)
        self.key_read = read_parameter(like, rotated, 2)
        rest = self.head_dim - 2 * self.num_planes
        self.key_read_plain = read_parameter(like, sum(plain), rest)
        self.key_write = self.key_write_plain = None
        if self.norm is not None:
            self.key_write = read_parameter(like, rotated, 2)
            self.key_write_plain = read_parameter(like, sum(plain), rest)
        value_read = read_parameter(like, sum(n * (g.value.stop - g.value.start) for n, g in sizes), self.head_dim)
        assert value_read is not None
        self.value_read = value_read
        for name, table in self._index_tables().items():
            self.register_buffer(name, None if table is None else torch.tensor(table), persistent=False)

    def _index_tables(self) -> dict[str, list[int] | None]:
        """The index buffers: frequencies of the slots, and the order that puts the groups' heads in the source's."""
        slots = [frequency for table in self.config.rotary_slots[self.layer_idx] for frequency in table]
        stored = [head for group in self.groups for head in group.heads]
        order = [stored.index(head) for head in range(len(stored))]
        return {
            "frequencies": slots or None,
            "head_order": None if order == sorted(order) else order,
        }

    def reset_tables(self) -> None:
        """Write the index buffers, which loading on the meta device leaves undefined."""
        for name, table in self._index_tables().items():
            if table is not None:
                getattr(self, name).copy_(torch.tensor(table))

    def _states(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [b, s, n_q, d], and the wide keys [b, s, 1, w_k] and values [b, s, 1, w_v] to cache; rotated."""
        turn, value = self._turn(position_embeddings), self.v_proj(hidden_states).unsqueeze(2)
        if self.norm is not None:
            query, whole = self._whole_states(hidden_states, turn)
            maps, parts = self._key_maps(self.key_write, self.key_write_plain), []
            for g, own in zip(self.groups, maps, strict=True):
                heads = whole[:, :, g.heads] if self._gathers else whole
                parts.append(self._written(heads, self._frequencies_of(g), *own))
            return query, torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], value
        query, key = self._heads(hidden_states, self.q_proj, 0), self.k_proj(hidden_states).unsqueeze(2)
        if turn is not None:
            query = rotate(query, *turn)
            if self.frequencies is not None:
                cos, sin = (angles.index_select(-1, self.frequencies) for angles in turn)
                parts = [rotate(key[..., g.key], cos[..., g.rotated], sin[..., g.rotated]) for g in self.groups]
                key = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return query, key, value

    def _frequencies_of(self, group: Group) -> torch.Tensor | None:
        """Of the group's slots; None where the layer has none."""
        return None if self.frequencies is None else self.frequencies[group.rotated]

    def _cache_shape(self, cache: Cache | None) -> tuple[int, int]:
        """One row holds all groups side by side."""
        return 1, -1

    def _expanded(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the source heads [b, n_s, s, d] that the cached ones [b, 1, s, w] give back."""
        keys, values, maps = [], [], self._read_maps()
        for group, (complex_read, plain_read, value_read) in zip(self.groups, maps, strict=True):
            keys.append(key[..., group.key] @ self._key_matrix(group, complex_read, plain_read))
            values.append(value[..., group.value] @ value_read)
        return self._in_order(keys), self._in_order(values)

    def attend_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one query per head, which reads every cached number once.

        `query` [b, n_q, 1, d], cached `key` [b, 1, s, w_k] and `value` [b, 1, s, w_v], mask [b, 1, 1, s] (bool,
        additive or None, or [b, n_q, 1, s] with biases) to the output [b, n_q, d] and, for "eager", the attention
        weights [b, n_q, 1, s].
        """
        query = (query.squeeze(2) * self.scaling).unflatten(1, (-1, self.num_key_value_groups))  # [b, n_s, q, d]
        maps, scores = self._read_maps(), []
        for group, (complex_read, plain_read, _) in zip(self.groups, maps, strict=True):
            own = query[:, group.heads] if self._gathers else query
            wide = self._wide_queries(own, group, complex_read, plain_read)
            scores.append(score(wide.flatten(1, 2), key[:, 0, :, group.key]))  # [b, queries of the group, s]
        in_order = self._in_order([_by_head(part, self.num_key_value_groups) for part in scores]).flatten(1, 2)
        weights = probabilities(in_order, attention_mask, self.softcap, self.sinks)
        by_head = weights.unflatten(1, (-1, self.num_key_value_groups))  # [b, n_s, q, s]
        outputs = []
        for group, (_, _, value_read) in zip(self.groups, maps, strict=True):
            own = by_head[:, group.heads] if self._gathers else by_head
            mixed = torch.bmm(own.flatten(1, 2), value[:, 0, :, group.value])  # [b, queries of the group, r]
            outputs.append(_by_head(mixed, self.num_key_value_groups) @ value_read)
        output = self._in_order(outputs).flatten(1, 2)
        return output, weights.unsqueeze(2) if self.config._attn_implementation == "eager" else None

    def _as_one_head(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of queries [b, s, n_q, d] wide ones [b, n_q, s, w]; the cached key and value as [b, 1, s, w]."""
        batch, width, maps = query.shape[0], self.config.one_head_widths[self.layer_idx], self._read_maps()
        query = query.flatten(0, 1).unflatten(1, (-1, self.num_key_value_groups))  # [b s, n_s, q, d]
        parts = []
        for group, (complex_read, plain_read, _) in zip(self.groups, maps, strict=True):
            own = query[:, group.heads] if self._gathers else query
            wide = self._wide_queries(own, group, complex_read, plain_read)
            parts.append(nn.functional.pad(wide, (group.key.start, width - group.key.stop)))
        query = self._in_order(parts).flatten(1, 2).unflatten(0, (batch, -1)).transpose(1, 2)
        return query, as_one_head(key, width), as_one_head(value, width)

    def _from_one_head(self, output: torch.Tensor) -> torch.Tensor:
        """Outputs [b, s, n_q, d] of those of one head [b, s, n_q, w]."""
        batch, maps = output.shape[0], self._read_maps()
        output = output.flatten(0, 1).unflatten(1, (-1, self.num_key_value_groups))  # [b s, n_s, q, w]
        parts = []
        for group, (_, _, value_read) in zip(self.groups, maps, strict=True):
            own = output[:, group.heads] if self._gathers else output
            parts.append(own[..., group.value] @ value_read)
        return self._in_order(parts).flatten(1, 2).unflatten(0, (batch, -1))

    @property
    def _gathers(self) -> bool:
        """Whether a group's heads have to be picked from the source's."""
        return len(self.groups) > 1 or self.head_order is not None

    def _in_order(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Parts [b, heads of the group, ...] of all groups as [b, n_s, ...] in the order of the source heads."""
        heads = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return heads if self.head_order is None else heads.index_select(1, self.head_order)

    def _read_maps(self) -> list[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]]:
        """Of each group: factors [n, S, 2], maps of the channels that are not rotated [n, c, d - 2 p] and [n, r, d]."""
        found, value = [], 0
        for group, keys in zip(self.groups, self._key_maps(self.key_read, self.key_read_plain), strict=True):
            rows = len(group.heads) * (group.value.stop - group.value.start)
            own = self.value_read[value : (value := value + rows)].unflatten(0, (len(group.heads), -1))
            found.append((*keys, own))
        return found

    def _key_maps(
        self, slots: torch.Tensor | None, others: torch.Tensor | None
    ) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Of each group, its rows of the maps of slots [n, S, 2] and of other channels [n, c, d - 2 p]."""
        found, slot, plain = [], 0, 0
        for group in self.groups:
            n, width = len(group.heads), group.key.stop - group.key.start - 2 * group.slots
            of_slots = of_others = None
            if slots is not None:
                of_slots = slots[slot : (slot := slot + n * group.slots)].unflatten(0, (n, group.slots))
            if others is not None:
                of_others = others[plain : (plain := plain + n * width)].unflatten(0, (n, width))
            found.append((of_slots, of_others))
        return found

    def _wide_queries(
        self, query: torch.Tensor, group: Group, complex_read: torch.Tensor | None, plain_read: torch.Tensor | None
    ) -> torch.Tensor:
        """Rotated queries [b, n, q, d] that read a group's cached keys as they are: [b, n, q, w_k]."""
        p, parts = self.num_planes, []
        if complex_read is not None:
            planes = query[..., : 2 * p].unflatten(-1, (2, p)).index_select(-1, self.frequencies[group.rotated])
            first, second = planes.unbind(-2)  # [b, n, q, S]
            real, imaginary = complex_read[:, None].unbind(-1)  # [n, 1, S]
            parts.append(torch.addcmul(first * real, second, imaginary))
            parts.append(torch.addcmul(second * real, first, imaginary, value=-1))
        if plain_read is not None:
            parts.append(query[..., 2 * p :] @ plain_read.mT)
        return torch.cat(parts, dim=-1)

    def _key_matrix(
        self, group: Group, complex_read: torch.Tensor | None, plain_read: torch.Tensor | None
    ) -> torch.Tensor:
        """What a cached key [w_k] is multiplied with to give those of the group's source heads: [n, w_k, d]."""
        n, p, slots = len(group.heads), self.num_planes, group.slots
        parts = []
        if complex_read is not None:
            real, imaginary = complex_read.unbind(-1)  # [n, S]
            place = nn.functional.one_hot(self.frequencies[group.rotated], p).to(real)  # [S, p]
            real, imaginary = real[..., None] * place, imaginary[..., None] * place  # [n, S, p]
            rest = real.new_zeros(n, slots, self.head_dim - 2 * p)
            parts += [torch.cat([real, imaginary, rest], dim=-1), torch.cat([-imaginary, real, rest], dim=-1)]
        if plain_read is not None:
            parts.append(nn.functional.pad(plain_read, (2 * p, 0)))
        return torch.cat(parts, dim=1)


def _by_head(rows: torch.Tensor, queries: int) -> torch.Tensor:
    """[b, n q, ...] -> [b, n, q, ...]."""
    return rows.unflatten(1, (-1, queries))


class LatentPreTrainedModel(FusedPreTrainedModel):
    """What the base model and the causal LM share: constructing one gives a subclass of the family's stock class."""

    config_class = LatentConfig
    attention_class: ClassVar[type] = LatentAttention

    def __init__(self, config: LatentConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        shared = SharedStates()
        first = next((i for i in range(config.num_hidden_layers) if config.is_read(i)), None)
        for attention in self.modules():
            if isinstance(attention, SharingAttention):
                attention.shared, attention.is_read = shared, config.is_read(attention.layer_idx)
                attention.begins_pass = attention.layer_idx == first

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """As of transformers; where layers read others, `use_reentrant` may not be True (ValueError)."""
        if self.config.last_reader is not None:
            shared = next(module.shared for module in self.modules() if isinstance(module, SharingAttention))
            gradient_checkpointing_kwargs = checkpointing_options(shared, gradient_checkpointing_kwargs)
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def attention_of(self, config: Any, layer_idx: int) -> type:
        """Layers that read other layers have an attention of their own."""
        return ReadingAttention if any(config.sources(layer_idx)) else LatentAttention


class LatentModel(LatentPreTrainedModel):
    """The decoder without the language-model head."""


class LatentForCausalLM(LatentPreTrainedModel, GenerationMixin):
    """The causal language model."""

    stock_classes = MODEL_FOR_CAUSAL_LM_MAPPING
