"""Attention that reads what earlier layers cache, beside a cache of its own or instead of one (MLKV, 2406.09297).

This file is shipped beside the weights, so it imports only torch, transformers and the standard library.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache

from .modeling_decode_step import probabilities, score
from .modeling_headfuse import HeadfuseAttention, rotate
from .modeling_shared_states import SharedStates, States


class SharingAttention(HeadfuseAttention):
    """Attention with wide heads, whose cached states later layers may read.

    Behind a norm the key projection is that of the source's heads. `key_write` and `key_write_plain` make the cached
    key of the normed ones, with rows as `key_read` and `key_read_plain` have for the layer's own channels.
    """

    shared: SharedStates
    is_read: bool
    begins_pass: bool
    num_planes: int
    key_write: nn.Parameter | None
    key_write_plain: nn.Parameter | None

    def _whole_states(self, hidden_states: torch.Tensor, turn: States | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [b, s, n_q, d] and keys of the source's heads [b, s, n_s, d], behind their norms and rotated."""
        query, key = self._heads(hidden_states, self.q_proj, 0), self._heads(hidden_states, self.k_proj, 1)
        return self._turned(query, key, turn)

    def _written(
        self,
        key: torch.Tensor,
        frequencies: torch.Tensor | None,
        complex_write: torch.Tensor | None,
        plain_write: torch.Tensor | None,
    ) -> torch.Tensor:
        """The cached key [b, s, 1, w_k] of a group's source keys [b, s, n, d], all rotated.

        Slots of these frequencies with factors [n, S, 2], then channels by maps [n, c, d - 2 p].
        """
        p, parts = self.num_planes, []
        if complex_write is not None:
            planes = key[..., : 2 * p].unflatten(-1, (2, p)).index_select(-1, frequencies)
            first, second = planes.unbind(-2)  # [b, s, n, S]
            real, imaginary = complex_write.unbind(-1)
            parts.append((first * real - second * imaginary).sum(2))
            parts.append((second * real + first * imaginary).sum(2))
        if plain_write is not None:
            parts.append(key[..., 2 * p :].flatten(2) @ plain_write.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts, dim=-1).unsqueeze(2)

    def _turn(self, position_embeddings: States | None) -> States | None:
        """The cos and sin [b, s, 1, p] of the planes that the layer turns; None where it turns none."""
        if position_embeddings is None:
            return None
        cos, sin = (angles[..., : self.num_planes] for angles in self._cos_and_sin(position_embeddings))
        return cos, sin

    def _angles(self, angles: torch.Tensor) -> torch.Tensor:
        """The cos or sin [b, s, 2 p] of all frequencies as [b, s, 1, p]."""
        planes = angles.shape[-1] // (1 if self.family.rotary in ("once", "swapped") else 2)
        return (angles[..., ::2] if self.family.rotary == "interleaved" else angles[..., :planes]).unsqueeze(2)

    def _with_past(
        self, key: torch.Tensor, value: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of all positions, which later layers find in `shared`."""
        states = super()._with_past(key, value, cache)
        if self.is_read:
            self.shared.put(self.layer_idx, states, self.begins_pass)
        return states


class ReadingAttention(SharingAttention):
    """Attention of a layer that reads the cached keys, the cached values or both of earlier layers.

    Its own cache holds `[b, 1, s, w]` for each side, where w may be 0. Every query head reads all parts. Parameters
    besides the projections: `key_read` [n_s S, 2], the complex factor with which each source head reads each slot, own
    slots first, then those of the sources; `key_read_plain` [n_s c, d - 2 p] and `value_read` [n_s w, d], likewise of
    channels.
    """

    key_sources: list[int]
    value_sources: list[int]
    is_last: bool
    num_source_heads: int
    own_slots: int
    parts: tuple[list[int], list[int]]
    key_read: nn.Parameter | None
    key_read_plain: nn.Parameter | None
    value_read: nn.Parameter
    first: torch.Tensor
    second: torch.Tensor
    plain: torch.Tensor
    frequencies: Any

    def decouple(self, config: Any) -> None:
        """Give a stock attention module, whose class has just become this one, the widths of its layer."""
        self.adopt(config)
        layer = self.layer_idx
        self.key_sources, self.value_sources = config.sources(layer)
        self.is_last = layer == config.last_reader
        self.num_planes = config.rotary_planes(layer)
        self.num_source_heads = sum(map(len, config.groups[layer]))
        self.num_key_value_groups = config.num_attention_heads // self.num_source_heads
        self.own_slots = len(config.rotary_slots[layer][0])
        own = config.key_widths[layer][0], config.value_widths[layer][0]
        keys = [sum(config.key_widths[source]) for source in self.key_sources]
        values = [sum(config.value_widths[source]) for source in self.value_sources]
        self.parts = [own[0], *keys], [own[1], *values]
        self.replace_projections(*own, whole_keys=self.norm is not None)
        tables, n, like = self._index_tables(), self.num_source_heads, self.q_proj.weight
        sizes = n * len(tables["frequencies"]), n * len(tables["plain"]), n * sum(self.parts[1])
        self.key_read = read_parameter(like, sizes[0], 2)
        self.key_read_plain = read_parameter(like, sizes[1], self.head_dim - 2 * self.num_planes)
        written = n if self.norm is not None else 0
        self.key_write = read_parameter(like, written * self.own_slots, 2)
        plain = written * (own[0] - 2 * self.own_slots)
        self.key_write_plain = read_parameter(like, plain, self.head_dim - 2 * self.num_planes)
        value_read = read_parameter(like, sizes[2], self.head_dim)
        assert value_read is not None
        self.value_read = value_read
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.long), persistent=False)

    def replace_projections(self, key_width: int, value_width: int, whole_keys: bool = False) -> None:
        """Projections of the source's queries and of what this layer caches; none where it caches nothing."""
        super().replace_projections(max(1, key_width), max(1, value_width), whole_keys)
        for name, width in (("k_proj", key_width), ("v_proj", value_width)):
            if not width:
                setattr(self, name, None)

    def _index_tables(self) -> dict[str, list[int]]:
        """Of the slots that this layer reads, the channels and the frequency; of the others the channels."""
        config, layer, start = self.config, self.layer_idx, 0
        first, second, plain, frequencies = list[int](), list[int](), list[int](), list[int]()
        for source in (layer, *self.key_sources):
            for width, table in zip(config.key_widths[source], config.rotary_slots[source], strict=True):
                turning = [slot for slot, frequency in enumerate(table) if frequency < self.num_planes]
                still = [slot for slot, frequency in enumerate(table) if frequency >= self.num_planes]
                middle, rest = start + len(table), start + 2 * len(table)
                first += [start + slot for slot in turning]
                second += [middle + slot for slot in turning]
                plain += [start + slot for slot in still]  # those of planes that this layer does not turn
                plain += [middle + slot for slot in still]
                plain += range(rest, start + width)
                frequencies += [table[slot] for slot in turning]
                start += width
        return {"first": first, "second": second, "plain": plain, "frequencies": frequencies}

    def reset_tables(self) -> None:
        """Write the index buffers, which loading on the meta device leaves undefined."""
        for name, table in self._index_tables().items():
            getattr(self, name).copy_(torch.tensor(table, dtype=torch.long))

    def _states(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [b, s, n_q, d], and the keys [b, s, 1, w_k] and values [b, s, 1, w_v] to cache; rotated."""
        turn, own, n = self._turn(position_embeddings), self.frequencies[: self.own_slots], self.num_source_heads
        none = hidden_states.new_empty((*hidden_states.shape[:2], 1, 0))
        value = none if self.v_proj is None else self.v_proj(hidden_states).unsqueeze(2)
        if self.k_proj is not None and self.norm is not None:
            query, whole = self._whole_states(hidden_states, turn)
            maps = (m if m is None else m.unflatten(0, (n, -1)) for m in (self.key_write, self.key_write_plain))
            return query, self._written(whole, own, *maps), value
        query = self._heads(hidden_states, self.q_proj, 0)
        key = none if self.k_proj is None else self.k_proj(hidden_states).unsqueeze(2)
        if turn is not None:
            query = rotate(query, *turn)
            if self.own_slots:
                key = rotate(key, *(angles.index_select(-1, own) for angles in turn))
        if self.norm is not None and self.family.norm_after_rotary:
            query = self._normed(query, 0)
        return query, key, value

    def _laid_out(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Heads before positions, as they are cached."""
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What this layer caches and what it reads of other layers, of each side; the last reader lets go of it."""
        keys = [key, *(self.shared.of(source)[0].to(key.device) for source in self.key_sources)]
        values = [value, *(self.shared.of(source)[1].to(value.device) for source in self.value_sources)]
        if self.is_last:
            self.shared.finish()
        return keys, values

    def _expanded(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the source heads [b, n_s, s, d] that all parts give back together."""
        keys, values = self._read(key, value)
        return _product(keys, self._key_matrix(), self.parts[0]), _product(values, self._value_matrix(), self.parts[1])

    def attend_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one query per head, which reads every cached number once; shapes as in LatentAttention."""
        keys, values = self._read(key, value)
        query = query.squeeze(2).unflatten(1, (-1, self.num_key_value_groups)) * self.scaling  # [b, n_s, q, d]
        wide = (query @ self._key_matrix().mT).flatten(1, 2).split(self.parts[0], dim=-1)  # [b, n_q, w] each
        scores = sum(score(part, cached[:, 0]) for part, cached in zip(wide, keys, strict=True) if part.shape[-1])
        assert isinstance(scores, torch.Tensor)
        weights = probabilities(scores, attention_mask, self.softcap, self.sinks)
        mixed = torch.cat([weights @ cached[:, 0] for cached in values], dim=-1)  # [b, n_q, w]
        output = mixed.unflatten(1, (-1, self.num_key_value_groups)) @ self._value_matrix()
        return output.flatten(1, 2), weights.unsqueeze(2) if self.config._attn_implementation == "eager" else None

    def _key_matrix(self) -> torch.Tensor:
        """What the channels of all cached keys are multiplied with to give those of the source heads: [n_s, w, d]."""
        n, p = self.num_source_heads, self.num_planes
        matrix = self.q_proj.weight.new_zeros(n, sum(self.parts[0]), self.head_dim)
        if self.key_read is not None:
            real, imaginary = self.key_read.unflatten(0, (n, -1)).to(matrix).unbind(-1)  # [n_s, S]
            place = nn.functional.one_hot(self.frequencies, p).to(matrix)  # [S, p]
            real, imaginary = real[..., None] * place, imaginary[..., None] * place
            rest = matrix.new_zeros(n, len(self.frequencies), self.head_dim - 2 * p)
            matrix = matrix.index_add(1, self.first, torch.cat([real, imaginary, rest], dim=-1))
            matrix = matrix.index_add(1, self.second, torch.cat([-imaginary, real, rest], dim=-1))
        if self.key_read_plain is not None:
            read = self.key_read_plain.unflatten(0, (n, -1)).to(matrix)
            matrix = matrix.index_add(1, self.plain, nn.functional.pad(read, (2 * p, 0)))
        return matrix

    def _value_matrix(self) -> torch.Tensor:
        """The same for values, [n_s, w, d]."""
        return self.value_read.unflatten(0, (self.num_source_heads, -1))


def _product(parts: list[torch.Tensor], matrix: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Cached states [b, 1, s, w] of several parts, multiplied with the rows of a matrix [n, sum of w, d] and added."""
    found = [part @ rows for part, rows in zip(parts, matrix.split(sizes, dim=1), strict=True) if part.shape[-1]]
    return sum(found[1:], start=found[0])


def read_parameter(like: torch.Tensor, rows: int, columns: int) -> nn.Parameter | None:
    """Read maps that are to be loaded, drawn small where nothing is; None without rows."""
    return nn.Parameter(torch.randn(rows, columns, dtype=like.dtype, device=like.device) * rows**-0.5) if rows else None
