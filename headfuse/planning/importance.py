"""HEAD_IMPORTANCE: what the loss says of every key head and value head of the source (mathematics.md section 8.7).

The published scores of head pruning, so that their budgets can be compared with measured costs of fusing: keeping
`count` heads of a row of the table costs the sum of the least important others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from headfuse.models.attention import AttentionWeights
from headfuse.models.decoder_layers import DecoderLayers, HiddenStates
from headfuse.models.streamed import StreamedModel
from headfuse.plan import HeadLayout

COALITIONS_PER_HEAD, COALITION_COST, MIN_TOKENS = 2, 6.0, 32
TRUNCATED_SHARE, TRUNCATED_LOSS = 0.25, 2.0
"""Coalitions lack at most this share of all heads, and count as at most this loss (nats a token) worse: a broken model
says nothing about its heads."""
RIDGE = 1e-3


def taylor(streamed: StreamedModel, windows: torch.Tensor, heads: HeadLayout, seed: int) -> torch.Tensor:
    """`[2, layers, n]`, keys and values apart: E|dL/dmask| over windows, L the language-modelling loss.

    "Are Sixteen Heads Really Better than One?" (1905.10650), equation 2. Keys and values are linear in their
    projections, so the gradient of a head's mask is the product of its weights with their gradient.

    Args:
        streamed: the source.
        windows: tokens `[k, T]`.
        heads: the source's heads.
        seed: not used.
    """
    source = DecoderLayers(streamed.model.config.to_dict(), streamed.arch, streamed.checkpoint, streamed.device)
    importance = torch.zeros(2, heads.num_hidden_layers, heads.num_key_value_heads, dtype=torch.float64)
    for window in windows.to(streamed.device):
        states, inputs = streamed.embed(window[None]), list[HiddenStates]()
        for layer_idx in range(streamed.num_layers):
            inputs.append(states)
            states = source.run(layer_idx, states)
        labels = window[1:]

        def cross_entropy(logits: torch.Tensor, part: slice, labels: torch.Tensor = labels) -> torch.Tensor:
            wanted = labels[part]
            return F.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="sum") / len(labels)

        gradient = streamed.end_gradient(states, cross_entropy)
        for layer_idx in reversed(range(streamed.num_layers)):
            prefix = streamed.arch.layer_prefix(layer_idx) + "."
            tensors = {prefix + name: tensor.float() for name, tensor in streamed.layer_tensors(layer_idx).items()}
            gradient, of_weights = source.backward(layer_idx, inputs.pop(), gradient, tensors)
            own, slope = (
                AttentionWeights.of_layer({n.removeprefix(prefix): t for n, t in some.items()}, streamed.arch, heads)
                for some in (tensors, of_weights)
            )
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


def shapley(streamed: StreamedModel, windows: torch.Tensor, heads: HeadLayout, seed: int) -> torch.Tensor:
    """`[2, layers, n]`: truncated Shapley values of the loss, from sampled coalitions.

    After CoKV (2502.17501) and Shapley Head Pruning (2210.05709): random sets of heads are masked, all coalitions go
    through the layers together, and the values are the least-squares additive explanation of their losses
    (KernelSHAP, 1705.07874).

    Args:
        streamed: the source.
        windows: tokens `[k, T]`, few: see `coalition_tokens`; each coalition sees one of them.
        heads: the source's heads.
        seed: of the coalitions.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = 2, heads.num_hidden_layers, heads.num_key_value_heads
    total = shape[0] * shape[1] * shape[2]
    most = max(1, int(total * TRUNCATED_SHARE))
    masked = torch.zeros(COALITIONS_PER_HEAD * total, total, dtype=torch.bool)
    for index, row in enumerate(masked):
        row[torch.randperm(total, generator=generator)[: 1 + index % most]] = True
    states = [streamed.embed(window[None]) for window in windows]
    variants = [states[index % len(windows)] for index in range(len(masked))]
    for layer_idx in range(streamed.num_layers):
        tensors = {name: tensor.float() for name, tensor in streamed.layer_tensors(layer_idx).items()}
        with streamed.layer(layer_idx, tensors) as run:
            states = [run(one, None) for one in states]
        for index, row in enumerate(masked.view(len(masked), *shape)[:, :, layer_idx]):
            weights = AttentionWeights.of_layer({n: t.clone() for n, t in tensors.items()}, streamed.arch, heads)
            weights.key[row[0]], weights.value[row[1]] = 0, 0
            if weights.key_bias is not None and weights.value_bias is not None:
                weights.key_bias[row[0]], weights.value_bias[row[1]] = 0, 0
            with streamed.layer(layer_idx, weights.in_layer(tensors, streamed.arch, heads)) as run:
                variants[index] = run(variants[index], None)
    whole = [streamed.nll(one, window[None])[0] for one, window in zip(states, windows, strict=True)]
    lost = torch.tensor(
        [streamed.nll(v, windows[i % len(windows)][None])[0] - whole[i % len(windows)] for i, v in enumerate(variants)],
        dtype=torch.float64,
    ).clamp_max(TRUNCATED_LOSS)
    design = masked.double()
    gram = design.T @ design
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, design.T @ lost).view(shape)


def coalition_tokens(windows: torch.Tensor, heads: HeadLayout) -> torch.Tensor:
    """The beginnings of windows `[k, T]`, so short that all coalitions cost as much as COALITION_COST such texts."""
    tokens = int(COALITION_COST * windows.numel() / (COALITIONS_PER_HEAD * heads.total_heads))
    return windows[:, : max(min(MIN_TOKENS, windows.shape[1]), tokens)]


HEAD_IMPORTANCE: dict[str, Callable[[StreamedModel, torch.Tensor, HeadLayout, int], torch.Tensor]] = {
    "taylor": taylor,
    "shapley": shapley,
}


def cost_rows(importance: torch.Tensor) -> list[list[float]]:
    """The cost table `[2 layers][n]` of keeping 1 to n heads, the most important ones, from scores `[2, layers, n]`."""
    rows = []
    for row in importance.clamp_min(0).flatten(0, 1).tolist():
        dropped = list(itertools.accumulate(sorted(row)))
        rows.append([*reversed(dropped[:-1]), 0.0])
    return rows
