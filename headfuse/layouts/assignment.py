"""Exact re-layout: the stock layer that computes the same as a layer with free maps (mathematics.md section 11)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from headfuse.models.attention import AttentionWeights
from headfuse.plan import Groups, HeadLayout, head_of_source


@dataclass(frozen=True)
class HeadAssignment:
    """The key head and the value head that each query head of a layer reads."""

    key_head_of_query: tuple[int, ...]
    value_head_of_query: tuple[int, ...]

    @classmethod
    def stock(cls, num_attention_heads: int, num_key_value_heads: int) -> HeadAssignment:
        """The assignment of a stock layer."""
        group = num_attention_heads // num_key_value_heads
        heads = tuple(query // group for query in range(num_attention_heads))
        return cls(heads, heads)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pair of key head and value head of each query head."""
        return list(zip(self.key_head_of_query, self.value_head_of_query, strict=True))

    @property
    def group(self) -> int:
        """Most query heads per KV head in an equivalent stock layer: equal groups need the gcd."""
        return math.gcd(*Counter(self.pairs).values())

    def stock_heads(self, group: int) -> StockHeads:
        """The stock layer with `group` query heads per KV head; `group` divides that of this layer."""
        pairs = self.pairs
        queries = sorted(range(len(pairs)), key=lambda query: (pairs[query], query))
        chunks = [tuple(queries[start : start + group]) for start in range(0, len(queries), group)]
        return StockHeads(
            tuple(queries),
            tuple(self.key_head_of_query[chunk[0]] for chunk in chunks),
            tuple(self.value_head_of_query[chunk[0]] for chunk in chunks),
        )


@dataclass(frozen=True)
class StockHeads:
    """The heads of a stock layer, as indices into the layer that it was made from."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return len(self.queries) // len(self.keys)

    @property
    def unchanged(self) -> bool:
        """True when every head stays where it is."""
        return all(heads == tuple(range(len(heads))) for heads in (self.queries, self.keys, self.values))

    def arrange(self, weights: AttentionWeights) -> AttentionWeights:
        """The weights of the stock layer."""
        sides = {"query": list(self.queries), "key": list(self.keys), "value": list(self.values)}
        moved: dict[str, Any] = {"output": weights.output[:, sides["query"]]}
        one_norm = weights.query_norm is not None and len(weights.query_norm) == 1  # the same for all heads
        for side, heads in sides.items():
            for name in (side, f"{side}_bias", f"{side}_norm"):
                tensor = getattr(weights, name, None)
                if tensor is not None and not (name.endswith("_norm") and one_norm):
                    moved[name] = tensor[heads]
        if weights.sinks is not None:
            moved["sinks"] = weights.sinks[sides["query"]]
        return replace(weights, **moved)


def common_group(layers: Sequence[HeadAssignment]) -> int:
    """Most query heads per KV head that all layers can have: the gcd of their groups."""
    return math.gcd(*(layer.group for layer in layers))


def head_of_query(groups: Groups, heads: HeadLayout) -> list[int]:
    """The fused head that each query head reads."""
    owner = head_of_source(groups)
    return [owner[heads.source_head(query)] for query in range(heads.num_attention_heads)]


def query_order(groups: Groups, heads: HeadLayout) -> list[int]:
    """The order of query heads that makes every group contiguous, as stock GQA reads them."""
    per_head = heads.queries_per_head
    return [head * per_head + i for group in groups for head in group for i in range(per_head)]
