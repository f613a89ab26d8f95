"""HEAD_IMPORTANCE: how much the loss depends on each key head and value head (mathematics.md section 8.7).

These are the published scores of head pruning, for comparison with measured costs of fusing. Keeping
`count` heads of a row of the table costs the sum of the least important others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from headfuse.models.attention import AttentionWeights
from headfuse.models.streamed import StreamedModel
from headfuse.plan import HeadLayout
from headfuse.planning.costs import CostTable

COALITIONS_PER_HEAD, COALITION_COST, MIN_TOKENS = 2, 6.0, 32
TRUNCATED_SHARE, TRUNCATED_LOSS = 0.25, 2.0
"""Largest share of heads that a coalition lacks, and largest loss increase that counts (nats per token): a broken model
says nothing about its heads.
"""
RIDGE = 1e-3


def taylor(streamed: StreamedModel, windows: torch.Tensor) -> torch.Tensor:
    """`[2, layers, n]`, keys and values apart: E|dL/dmask| over windows, L the language-modelling loss.

    "Are Sixteen Heads Really Better than One?" (1905.10650), equation 2. Keys and values are linear in their
    projections, so the gradient of a head's mask is the product of its weights with their gradient.

    Args:
        streamed: the source.
        windows: tokens `[k, T]`.
    """
    source, arch, heads = streamed.layers, streamed.arch, streamed.heads
    importance = torch.zeros(2, heads.num_hidden_layers, heads.num_key_value_heads, dtype=torch.float64)
    for window in windows.to(streamed.device):
        *inputs, states = source.forward(streamed.embed(window[None]))
        labels = window[1:]

        def cross_entropy(logits: torch.Tensor, part: slice, labels: torch.Tensor = labels) -> torch.Tensor:
            wanted = labels[part]
            return F.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="sum") / len(labels)

        gradient = streamed.end_gradient(states, cross_entropy)
        for layer_idx in reversed(range(streamed.num_layers)):
            prefix, tensors = arch.layer_prefix(layer_idx) + ".", streamed.layer_tensors(layer_idx)
            named = {prefix + name: tensor for name, tensor in tensors.items()}
            gradient, of_weights = source.backward(layer_idx, inputs.pop(), gradient, named)
            slopes = {name.removeprefix(prefix): slope for name, slope in of_weights.items()}
            own, slope = (AttentionWeights.of_layer(each, arch, heads) for each in (tensors, slopes))
            importance[0, layer_idx] += _product(own.key, slope.key, own.key_bias, slope.key_bias)
            importance[1, layer_idx] += _product(own.value, slope.value, own.value_bias, slope.value_bias)
    return importance / len(windows)


def _product(
    weight: torch.Tensor, gradient: torch.Tensor, bias: torch.Tensor | None, bias_gradient: torch.Tensor | None
) -> torch.Tensor:
    total = (weight.cpu().double() * gradient.cpu().double()).sum((1, 2))
    if bias is not None and bias_gradient is not None:
        total += (bias.cpu().double() * bias_gradient.cpu().double()).sum(1)
    return total.abs()


def shapley(streamed: StreamedModel, windows: torch.Tensor, seed: int) -> torch.Tensor:
    """`[2, layers, n]`: truncated Shapley values of the loss, from sampled coalitions.

    After CoKV (2502.17501) and Shapley Head Pruning (2210.05709): random sets of heads are masked, all coalitions go
    through the layers together, and the values are the least-squares additive explanation of their losses
    (KernelSHAP, 1705.07874).

    Args:
        streamed: the source.
        windows: tokens `[k, T]`; each coalition sees the beginning of one of them (`coalition_tokens`).
        seed: of the coalitions.
    """
    heads = streamed.heads
    windows, shape = coalition_tokens(windows, heads), (2, heads.num_hidden_layers, heads.num_key_value_heads)
    masked = _coalitions(heads.total_heads, seed)
    embedded = tuple(streamed.embed(window[None]) for window in windows)
    variants, states = [embedded[index % len(windows)] for index in range(len(masked))], embedded
    for layer in streamed.walk((), embedded):
        states = layer.outputs
        without = masked.view(len(masked), *shape)[:, :, layer.index].to(layer.weights.key.device)
        for index, row in enumerate(without):
            weights = _without(layer.weights, row[0], row[1])
            tensors = weights.in_layer(layer.tensors, streamed.arch, heads)
            with streamed.layer(layer.index, tensors) as run:
                variants[index] = run(variants[index])
    whole = [streamed.nll(one, window[None])[0] for one, window in zip(states, windows, strict=True)]
    lost = torch.tensor(
        [streamed.nll(v, windows[i % len(windows)][None])[0] - whole[i % len(windows)] for i, v in enumerate(variants)],
        dtype=torch.float64,
    ).clamp_max(TRUNCATED_LOSS)
    design = masked.double()
    gram = design.T @ design
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, design.T @ lost).view(shape)


def _coalitions(total: int, seed: int) -> torch.Tensor:
    """Which of `total` heads each random coalition lacks, `[coalitions, total]`."""
    generator, most = torch.Generator().manual_seed(seed), max(1, int(total * TRUNCATED_SHARE))
    masked = torch.zeros(COALITIONS_PER_HEAD * total, total, dtype=torch.bool)
    for index, row in enumerate(masked):
        row[torch.randperm(total, generator=generator)[: 1 + index % most]] = True
    return masked


def _without(weights: AttentionWeights, keys: torch.Tensor, values: torch.Tensor) -> AttentionWeights:
    """Weights with some key heads and some value heads `[n]` set to zero."""

    def zeroed(tensor: Any, heads: torch.Tensor) -> Any:
        return None if tensor is None else tensor.masked_fill(heads.view(-1, *[1] * (tensor.ndim - 1)), 0)

    return replace(
        weights,
        key=zeroed(weights.key, keys),
        key_bias=zeroed(weights.key_bias, keys),
        value=zeroed(weights.value, values),
        value_bias=zeroed(weights.value_bias, values),
    )


def coalition_tokens(windows: torch.Tensor, heads: HeadLayout) -> torch.Tensor:
    """Beginnings of windows `[k, T]`, so short that all coalitions cost COALITION_COST passes over the text."""
    tokens = int(COALITION_COST * windows.numel() / (COALITIONS_PER_HEAD * heads.total_heads))
    return windows[:, : max(min(MIN_TOKENS, windows.shape[1]), tokens)]


HEAD_IMPORTANCE: dict[str, Callable[[StreamedModel, torch.Tensor, int], torch.Tensor]] = {
    "taylor": lambda streamed, windows, seed: taylor(streamed, windows),
    "shapley": shapley,
}
"""Scores `[2, layers, n]` of the source's key heads and value heads, from token windows `[k, T]` and a seed."""


def cost_table(importance: torch.Tensor) -> CostTable:
    """What keeping 1 to n heads, the most important ones, costs, from scores `[2, layers, n]`."""

    def row(scores: list[float]) -> list[float]:
        dropped = list(itertools.accumulate(sorted(scores)))
        return [*reversed(dropped[:-1]), 0.0]

    keys, values = importance.clamp_min(0).tolist()
    return CostTable([row(scores) for scores in keys], [row(scores) for scores in values])
