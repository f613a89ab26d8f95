"""Which cached head each query head reads, in every layout."""

from __future__ import annotations

import itertools
from math import gcd, lcm

import pytest
import torch

from headfuse.layouts.assignment import HeadAssignment, common_group


@pytest.mark.parametrize("seed", range(20))
def test_the_stock_layer_reads_the_same_heads_and_has_the_fewest(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randint(2, (8,), generator=generator).tolist() for _ in range(2)]
    layer = HeadAssignment(tuple(maps[0]), tuple(maps[1]))
    stock = layer.stock_heads(layer.group)
    assert sorted(stock.queries) == list(range(8))
    for place, query in enumerate(stock.queries):
        head = place // stock.group
        assert (stock.keys[head], stock.values[head]) == layer.pairs[query]
    sizes = [layer.pairs.count(pair) for pair in set(layer.pairs)]
    fewest = min(8 // group for group in range(1, 9) if all(size % group == 0 for size in sizes))
    assert len(stock.keys) == fewest


def test_one_count_for_all_layers_is_the_least_common_multiple() -> None:
    for groups in itertools.product((1, 2, 3, 4, 6, 12), repeat=2):
        layers = [HeadAssignment.stock(12, 12 // group) for group in groups]
        assert 12 // common_group(layers) == lcm(*(12 // group for group in groups))
        assert common_group(layers) == gcd(*groups)
