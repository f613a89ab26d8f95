"""GROUPERS: partitions of a layer's heads from the cost of fusing each pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from random import Random

from headfuse.plan import Groups

PairCost = Sequence[Sequence[float]]


def cluster(cost: PairCost, count: int, equal: bool) -> Groups:
    """Clusters of small pair costs: greedy tight groups or agglomeration, then moves and swaps while they help.

    Args:
        cost: `[n, n]` symmetric cost of fusing two heads into one.
        count: number of groups.
        equal: groups of one size (`count` must divide n).
    """
    groups = _greedy(cost, count) if equal else _agglomerate(cost, count)
    return canonical(_improve(cost, groups, equal))


def neighbours(cost: PairCost, count: int, equal: bool) -> Groups:
    """Adjacent heads, as mean-pooled GQA groups them (arXiv 2305.13245)."""
    n = len(cost)
    bounds = [n * i // count for i in range(count + 1)]
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(bounds))


def anneal(cost: PairCost, count: int, equal: bool, seed: int = 0) -> Groups:
    """Simulated annealing over groups as equal as `count` allows (DHA, arXiv 2406.06567, algorithm 4).

    Two heads of different groups change places; 110 such proposals, T from 100 to 1e-3, and the last state counts. The
    paper's listing leaves open which sign it means: here, as in its text, the loss within the groups falls.
    """
    random, n = Random(seed), len(cost)
    heads = random.sample(range(n), n)
    sizes = [n * (i + 1) // count - n * i // count for i in range(count)]

    def groups() -> list[list[int]]:
        left = iter(heads)
        return [list(itertools.islice(left, size)) for size in sizes]

    def score() -> float:
        return sum(cost[i][j] for group in groups() for i, j in itertools.combinations(group, 2))

    temperature, now = 100.0, score()
    while temperature > 1e-3 and 1 < count < n:
        first, second = (random.choice(group) for group in random.sample(groups(), 2))
        a, b = heads.index(first), heads.index(second)
        heads[a], heads[b] = second, first
        new = score()
        if new < now or math.exp((now - new) / temperature) > random.random():
            now = new
        else:
            heads[a], heads[b] = first, second
        temperature *= 0.9
    return canonical(groups())


GROUPERS: dict[str, Callable[[PairCost, int, bool], Groups]] = {
    "cluster": cluster,
    "neighbours": neighbours,
    "anneal": anneal,
}


def canonical(groups: Sequence[Sequence[int]]) -> Groups:
    """Heads ascending within groups, groups by their first head."""
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _group_cost(cost: PairCost, group: Sequence[int]) -> float:
    """The cost of one group, after Ward: mean pair cost times (size - 1)."""
    total = sum(cost[i][j] for a, i in enumerate(group) for j in group[a + 1 :])
    return 2 * total / len(group) if len(group) > 1 else 0.0


def _greedy(cost: PairCost, count: int) -> list[list[int]]:
    left, size, groups = set(range(len(cost))), len(cost) // count, []
    while left:
        if size == 1:
            groups.append([left.pop()])
            continue
        first, second = min(((i, j) for i in left for j in left if i < j), key=lambda p: (cost[p[0]][p[1]], p))
        group = [first, second]
        while len(group) < size:
            group.append(min(left - set(group), key=lambda h: (sum(cost[h][i] for i in group), h)))
        left -= set(group)
        groups.append(group)
    return groups


def _agglomerate(cost: PairCost, count: int) -> list[list[int]]:
    groups = [[i] for i in range(len(cost))]
    while len(groups) > count:
        own = [_group_cost(cost, group) for group in groups]
        _, a, b = min(
            (_group_cost(cost, groups[a] + groups[b]) - own[a] - own[b], a, b)
            for a in range(len(groups))
            for b in range(a + 1, len(groups))
        )
        groups[a] += groups.pop(b)
    return groups


def _improve(cost: PairCost, groups: list[list[int]], equal: bool, sweeps: int = 20) -> list[list[int]]:
    for _ in range(sweeps):
        changed = False
        for a in range(len(groups)):
            for b in range(len(groups)):
                changed |= a != b and _improve_pair(cost, groups, a, b, equal)
        if not changed:
            break
    return groups


def _improve_pair(cost: PairCost, groups: list[list[int]], a: int, b: int, equal: bool) -> bool:
    before = _group_cost(cost, groups[a]) + _group_cost(cost, groups[b])
    candidates = [
        ([*(h for h in groups[a] if h != i), j], [*(h for h in groups[b] if h != j), i])
        for i in groups[a]
        for j in groups[b]
    ]
    if not equal and len(groups[a]) > 1:
        candidates += [([h for h in groups[a] if h != i], [*groups[b], i]) for i in groups[a]]
    best, left, right = min((_group_cost(cost, x) + _group_cost(cost, y), x, y) for x, y in candidates)
    if best < before - 1e-12 * abs(before):
        groups[a], groups[b] = left, right
        return True
    return False
