"""One query per head against a cache: every cached key and value is read once, by all query heads that share it.

This file is shipped beside the weights, so it imports only torch and the standard library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Sizes = list[int] | int
"""Rows of each head, or the one number of all."""


def rows_by_head(
    key_map: list[int], value_map: list[int]
) -> tuple[tuple[Sizes, Sizes], tuple[Sizes, Sizes], dict[str, Any]]:
    """How query heads are sorted so that those that read one key head, then one value head, lie together.

    Args:
        key_map: the key head that each query head reads.
        value_map: likewise.

    Returns:
        The sizes of the groups by key head and by value head, the same where all groups are padded to one size, and
        which rows to take in either case (`_rows`; None = as they lie).
    """
    # Within its group a query may stand anywhere: where groups nest, in order, no scores are moved.
    by_key = [sorted(group, key=value_map.__getitem__) for group in _groups(key_map)]
    order = [query for group in by_key for query in group]
    by_value = [sorted(group, key=order.index) for group in _groups(value_map)]
    key_padded, value_padded = _padded(by_key), _padded(by_value)
    rows = {
        **_rows("", by_key, by_value, len(key_map)),
        **_rows("padded_", key_padded, value_padded, len(key_map)),
    }
    return (_sizes(by_key), _sizes(by_value)), (_sizes(key_padded), _sizes(value_padded)), rows


def pads(device: torch.device, num_cached: int) -> bool:
    """Whether one product over groups of one size beats a smaller one per head: where calls cost more than numbers."""
    return device.type != "cpu" or num_cached < 1024


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


def select(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Rows of `states` [b, rows, ...]; None takes all of them."""
    return states if index is None else states.index_select(1, index)


def unfold(folded: torch.Tensor, head_dim: int) -> torch.Tensor:
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


def grouped_product(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    folded: torch.Tensor,
    sizes: Sizes,
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
        return product(rows.reshape(-1, sizes, width), unfold(folded, head_dim)[0]).reshape(batch, num_rows, -1)
    views = folded.split(head_dim, dim=-1)
    rows = rows.reshape(-1, len(views), sizes, width)
    products = [product(rows[:, i], view.flatten(0, 1)) for i, view in enumerate(views)]
    return torch.stack(products, dim=1).reshape(batch, num_rows, -1)


def _heads(folded: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """The heads [b, s, d]."""
    rows = folded.unbind(1)
    return list(rows) if folded.shape[3] == head_dim else [head for row in rows for head in row.split(head_dim, dim=-1)]


def index_of(table: list[int], num_source: int) -> list[int] | None:
    """The rows to take of `num_source`; None where they are taken as they lie."""
    return None if table == list(range(num_source)) else table


def _groups(heads: list[int]) -> list[list[int]]:
    """The query heads that read each head."""
    return [[query for query, read in enumerate(heads) if read == head] for head in range(max(heads) + 1)]


def _padded(groups: list[list[int]]) -> list[list[int]]:
    """Groups of one size: smaller ones repeat a member."""
    return [group + group[:1] * (max(map(len, groups)) - len(group)) for group in groups]


def _sizes(groups: list[list[int]]) -> Sizes:
    """Of each group, or the one of all."""
    sizes = list(map(len, groups))
    return sizes if len(set(sizes)) > 1 else sizes[0]


def _rows(prefix: str, by_key: list[list[int]], by_value: list[list[int]], num_queries: int) -> dict[str, Any]:
    """Which rows to take for the queries sorted by key head, then for the scores by value head, then for the output."""
    keys, values = ([query for group in groups for query in group] for groups in (by_key, by_value))
    return {
        f"{prefix}query_rows": index_of(keys, num_queries),
        f"{prefix}score_rows": index_of([keys.index(query) for query in values], len(keys)),
        f"{prefix}output_rows": index_of([values.index(query) for query in range(num_queries)], len(values)),
    }
