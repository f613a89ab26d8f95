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
    groups = {i: [i] for i in range(len(cost))}
    own = dict.fromkeys(groups, 0.0)

    def rise(a: int, b: int) -> float:
        return _group_cost(cost, groups[a] + groups[b]) - own[a] - own[b]

    rises = {pair: rise(*pair) for pair in itertools.combinations(groups, 2)}
    while len(groups) > count:
        a, b = min(rises, key=lambda pair: (rises[pair], pair))
        groups[a] += groups.pop(b)
        own[a] = _group_cost(cost, groups[a])
        rises = {pair: value for pair, value in rises.items() if b not in pair}
        rises.update({pair: rise(*pair) for pair in rises if a in pair})
    return list(groups.values())


def _improve(cost: PairCost, groups: list[list[int]], equal: bool, sweeps: int = 20) -> list[list[int]]:
    settled = dict[tuple[int, int], tuple[list[int], list[int]]]()  # what a pair was when nothing made it better
    for _ in range(sweeps):
        changed = False
        for a, b in itertools.permutations(range(len(groups)), 2):
            pair = groups[a], groups[b]
            known = settled.get((a, b))
            if len(pair[0]) == len(pair[1]) == 1 or (known and known[0] is pair[0] and known[1] is pair[1]):
                continue
            if _improve_pair(cost, groups, a, b, equal):
                changed = True
            else:
                settled[a, b] = pair
        if not changed:
            break
    return groups


def _improve_pair(cost: PairCost, groups: list[list[int]], a: int, b: int, equal: bool) -> bool:
    left, right = groups[a], groups[b]
    before = _group_cost(cost, left) + _group_cost(cost, right)
    estimates = _exchanges(cost, left, right, equal)
    near = min(estimates.values()) + ROUNDING * max(before, 1e-300)
    best, *pair = min(
        (_group_cost(cost, x) + _group_cost(cost, y), x, y)
        for x, y in (_exchanged(left, right, *heads) for heads, value in estimates.items() if value <= near)
    )
    if best < before - 1e-12 * abs(before):
        groups[a], groups[b] = pair
        return True
    return False


ROUNDING = 1e-9
"""Largest rounding error of an estimated cost, relative to the cost of both groups."""


def _exchanges(cost: PairCost, left: list[int], right: list[int], equal: bool) -> dict[tuple[int, int | None], float]:
    """Estimated cost of both groups after exchanging head i of `left` for head j of `right`, or for none."""

    def within(head: int, group: list[int]) -> float:
        return sum(cost[head][other] for other in group if other != head)

    to_left, to_right = ({h: within(h, group) for h in (*left, *right)} for group in (left, right))
    total, other = sum(to_left[h] for h in left) / 2, sum(to_right[h] for h in right) / 2
    n, m = len(left), len(right)
    found: dict[tuple[int, int | None], float] = {
        (i, j): 2 * (total - to_left[i] + to_left[j] - cost[i][j]) / n
        + 2 * (other - to_right[j] + to_right[i] - cost[i][j]) / m
        for i in left
        for j in right
    }
    if not equal and n > 1:
        found |= {(i, None): 2 * (total - to_left[i]) / (n - 1) + 2 * (other + to_right[i]) / (m + 1) for i in left}
    return found


def _exchanged(left: list[int], right: list[int], i: int, j: int | None) -> tuple[list[int], list[int]]:
    came = [] if j is None else [j]
    return [*(h for h in left if h != i), *came], [*(h for h in right if h != j), i]
