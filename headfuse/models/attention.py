"""The attention weights of one layer, head by head in the canonical order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from headfuse.models.families import READ_MAPS, SINKS, WRITE_MAPS, Architecture
from headfuse.plan import HeadLayout

CHANNELWISE = ("query", "key", "query_bias", "key_bias", "query_norm", "key_norm")
"""Fields whose second dimension is the channels of a query or key head."""


def canonical_order(arch: Architecture, heads: HeadLayout) -> list[int] | None:
    """The channel at each place of the canonical order of a query or key head; None if the family has that order.

    Canonical: the first channels of all rotary planes, the second ones, then what is not rotated.
    """
    if arch.rotary != "interleaved":
        return None
    rotated = heads.rotary_dim
    return [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, heads.head_dim)]


def module_tensors(tensors: Mapping[str, torch.Tensor], arch: Architecture) -> dict[str, torch.Tensor]:
    """A layer's stored tensors (names relative to it) as its module holds them: experts stacked."""
    held = dict(tensors)
    for parameter, sources in arch.stacked.items():
        stored = [_numbered(held, source) if "{expert}" in source else [source] for source in sources]
        if stored[0] and all(name in held for names in stored for name in names):
            parts = [[held.pop(name) for name in names] for names in stored]
            single = "{expert}" not in sources[0]
            held[parameter] = parts[0][0] if single else torch.cat([torch.stack(part) for part in parts], dim=1)
    return held


def stored_tensors(tensors: Mapping[str, torch.Tensor], arch: Architecture) -> dict[str, torch.Tensor]:
    """The inverse of `module_tensors`, of any of a layer's tensors: experts as checkpoints of the family hold them."""
    stored = dict(tensors)
    for parameter, sources in arch.stacked.items():
        whole = stored.pop(parameter, None)
        if whole is not None:
            single = "{expert}" not in sources[0]
            parts = [whole] if single else [part for expert in whole for part in expert.chunk(len(sources))]
            count = len(parts) // len(sources)
            names = [source.format(expert=expert) for expert in range(count) for source in sources]
            stored |= zip(names, parts, strict=True)
    return stored


def _numbered(tensors: Mapping[str, torch.Tensor], pattern: str) -> list[str]:
    names = (pattern.format(expert=expert) for expert in itertools.count())
    return list(itertools.takewhile(tensors.__contains__, names))


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one layer, head by head; channels of queries and keys in the canonical order.

    Shapes: `query [n_q, d, D]`, `key [n_k, d, D]`, `value [n_v, d, D]`, `output [D, n_q, d]`; biases `[n, d]` for
    query, key and value, `[D]` for the output, or None; weights of the norms of queries and keys `[1, d]` where all
    heads share one, `[n, d]` where each head has its own or the layer has one norm; None where there is none.
    `sinks [n_q]`, where there are any.

    Wide heads: `key [1, w_k, D]` and `value [1, w_v, D]` of all groups side by side, and their read maps as the model
    code of layout latent has them. Behind a norm the `key` is that of the source's heads, and write maps stand beside
    the read maps; both sides of it have the same order of rows.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_bias: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    key_write: torch.Tensor | None = None
    key_write_plain: torch.Tensor | None = None
    key_read: torch.Tensor | None = None
    key_read_plain: torch.Tensor | None = None
    value_read: torch.Tensor | None = None

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], arch: Architecture, heads: HeadLayout
    ) -> AttentionWeights:
        """Split an attention module's tensors (names relative to it) into heads."""
        output = tensors[f"{arch.output}.weight"]
        output = output.T if arch.transposed else output
        found: dict[str, torch.Tensor | None] = {"output_bias": tensors.get(f"{arch.output}.bias")}
        found |= {name: tensors.get(name) for name in (SINKS, *WRITE_MAPS, *READ_MAPS)}
        normed = any(name.startswith(f"{norm}.") for norm in arch.norms for name in tensors)
        wide = {"value"} if normed else {"key", "value"}
        wide = set() if found["value_read"] is None else wide
        found["output"] = output.reshape(output.shape[0], -1, heads.head_dim)
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            for side, tensor in zip(
                ("query", "key", "value"), split_projections(tensors, kind, arch, heads), strict=True
            ):
                if tensor is not None:
                    head = (1, -1) if side in wide else (-1, heads.head_dim)
                    tensor = tensor.reshape(*head, *tensor.shape[1:])
                found[side + suffix] = tensor
        for side, name in zip(("query", "key"), arch.norms, strict=False):
            parts = [tensors[part] for part in _numbered(tensors, f"{name}.norms.{{expert}}.weight")]
            norm = torch.stack(parts) if parts else tensors.get(f"{name}.weight")
            found[f"{side}_norm"] = None if norm is None else norm.view(-1, heads.head_dim)
        return cls(**found).reordered(canonical_order(arch, heads))  # type: ignore[arg-type]

    @classmethod
    def of_layer(cls, tensors: Mapping[str, torch.Tensor], arch: Architecture, heads: HeadLayout) -> AttentionWeights:
        """The attention projections among a layer's tensors (names relative to the layer)."""
        prefix = arch.attention + "."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return cls.from_tensors(own, arch, heads)

    def in_layer(
        self,
        tensors: Mapping[str, torch.Tensor],
        arch: Architecture,
        heads: HeadLayout,
        stored: Architecture | None = None,
    ) -> dict[str, torch.Tensor]:
        """A layer's tensors with these projections instead of its own; `stored`: in the form of another family."""
        stored = stored or arch
        others = {name: tensor for name, tensor in tensors.items() if not arch.owns(name)}
        others = module_tensors(others, arch) if arch.stacked and not stored.stacked else others
        own = {f"{stored.attention}.{name}": tensor for name, tensor in self.to_tensors(stored, heads).items()}
        return {**others, **own}

    def to_tensors(self, arch: Architecture, heads: HeadLayout) -> dict[str, torch.Tensor]:
        """The inverse of `from_tensors`."""
        order = canonical_order(arch, heads)
        own = self.reordered(order and sorted(range(len(order)), key=order.__getitem__))
        output = own.output.flatten(1, 2)
        tensors = {
            f"{arch.output}.weight": output.T.contiguous() if arch.transposed else output,
            f"{arch.output}.bias": own.output_bias,
        }
        weights, biases = (own.query, own.key, own.value), (own.query_bias, own.key_bias, own.value_bias)
        for kind, parts in (("weight", weights), ("bias", biases)):
            flat = [None if part is None else part.flatten(0, 1) for part in parts]
            tensors |= _join(flat, kind, arch, heads)
        for name, norm in zip(arch.norms, (own.query_norm, own.key_norm), strict=False):
            if norm is not None and arch.norm_form == "modules":
                tensors |= {f"{name}.norms.{head}.weight": weight for head, weight in enumerate(norm)}
            else:
                tensors[f"{name}.weight"] = (
                    None if norm is None else norm if arch.norm_form == "rows" else norm.flatten()
                )
        tensors |= {name: getattr(own, name) for name in (SINKS, *WRITE_MAPS, *READ_MAPS)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.numel()}

    def double(self) -> AttentionWeights:
        """These weights in float64."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if part is None else part.double() for name, part in parts.items()}
        return replace(self, **changed)

    def resized(self, num_key_heads: int, num_value_heads: int) -> AttentionWeights:
        """Weights for other head counts, without data."""

        def empty(tensor: Any, count: int) -> Any:
            return None if tensor is None else tensor.new_empty((count, *tensor.shape[1:]))

        norm = (
            self.key_norm if self.key_norm is None or len(self.key_norm) == 1 else empty(self.key_norm, num_key_heads)
        )
        return replace(
            self,
            key=empty(self.key, num_key_heads),
            key_bias=empty(self.key_bias, num_key_heads),
            key_norm=norm,
            value=empty(self.value, num_value_heads),
            value_bias=empty(self.value_bias, num_value_heads),
        )

    def reordered(self, order: list[int] | None, moved: Sequence[str] = CHANNELWISE) -> AttentionWeights:
        """These weights with the channels of queries and keys in another order; `moved`: the fields that change."""
        if order is None:
            return self
        parts = {name: getattr(self, name) for name in moved}
        changed: dict[str, Any] = {n: None if part is None else part[:, order] for n, part in parts.items()}
        return replace(self, **changed)


def split_projections(
    tensors: Mapping[str, torch.Tensor], kind: str, arch: Architecture, heads: HeadLayout
) -> list[torch.Tensor | None]:
    """Rows `[n d, D]` (`weight`) or `[n d]` (`bias`) of query, key and value, as a family stores them."""
    if arch.packed is None:
        return [tensors.get(f"{name}.{kind}") for name in arch.projections]
    whole = tensors.get(f"{arch.packed}.{kind}")
    if whole is None:
        return [None, None, None]
    whole = whole.T if arch.transposed and kind == "weight" else whole
    if arch.packing == "heads":
        return [part.flatten(0, 1) for part in whole.unflatten(0, (-1, 3, heads.head_dim)).unbind(1)]
    queries = heads.num_attention_heads * heads.head_dim
    pairs = (len(whole) - queries) // 2
    return list(whole.split([queries, pairs, pairs]))


def packed_keys_and_values(arch: Architecture, heads: HeadLayout, num_rows: int) -> torch.Tensor:
    """The rows of a packed projection, of `num_rows` in all, that make keys and values."""
    _, keys, values = split_projections({f"{arch.packed}.bias": torch.arange(num_rows)}, "bias", arch, heads)
    assert keys is not None
    assert values is not None
    return torch.cat([keys, values])


def _join(
    parts: list[torch.Tensor | None], kind: str, arch: Architecture, heads: HeadLayout
) -> dict[str, torch.Tensor | None]:
    """The inverse of `split_projections`, by name."""
    if arch.packed is None:
        return {f"{name}.{kind}": part for name, part in zip(arch.projections, parts, strict=True)}
    present = [part for part in parts if part is not None]
    if not present:
        return {}
    if arch.packing == "heads":
        by_head = [part.unflatten(0, (-1, heads.head_dim)) for part in present]
        whole = torch.stack(by_head, dim=1).flatten(0, 2)
    else:
        whole = torch.cat(present)
    return {f"{arch.packed}.{kind}": whole.T.contiguous() if arch.transposed and kind == "weight" else whole}
