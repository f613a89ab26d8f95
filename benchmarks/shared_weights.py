"""Attention parameters saved by low rank, by matrices shared between layers and by shared heads, without training.

    python benchmarks/shared_weights.py MODEL --train TEXT --validation TEXT [TEXT ...] [--kept 5/6 2/3]
        [--projections o_proj] [--windows 8] [--test 6]

For Llama-like models with separate projections. A row gives the NLL per token that each method adds, in each text:
- low rank: W ~ A B for every projection, the best one for the inputs of the calibration text;
- atoms: W_l = sum_k c_lk D_k over the layers l of a kind of projection (MASA, arXiv 2508.04581), by alternating least
  squares in the metric of each layer's inputs; every layer's error counts as a share of its output;
- atoms, plain: the same in the Frobenius norm, in closed form;
- shared heads: the heads with the largest cosine between their query and key weights, of two layers but the first, take
  one copy of all their weights (DirectShare, arXiv 2402.11819);
- dropped heads: those that shared heads replaces, without anything in their place.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headfuse.models.loading import load_tokenizer
from headfuse.text.documents import read_documents
from headfuse.text.windows import varied_windows

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
Weights = dict[str, Tensor]
"""`[L, m, D]` of each kind."""
ROUNDS, CG_STEPS = 12, 12
RIDGE = 1e-4
"""Share of the mean diagonal that is added to a metric."""


class Attention:
    """A model's attention projections, and second moments of their inputs."""

    def __init__(self, model: Any, windows: Tensor) -> None:
        self.model, self.layers = model, [layer.self_attn for layer in model.model.layers]
        self.weights: Weights = {
            kind: torch.stack([getattr(layer, kind).weight.detach().double() for layer in self.layers])
            for kind in KINDS
        }
        self.metrics = self._metrics(windows)
        self.energy = {
            kind: torch.einsum("lmD,lDE,lmE->l", self.weights[kind], self.metrics[kind], self.weights[kind])
            for kind in KINDS
        }

    @torch.no_grad()
    def _metrics(self, windows: Tensor) -> Weights:
        """`[L, D, D]` of each kind: E[x x^T] with a ridge."""
        moments = {kind: [torch.zeros(())] * len(self.layers) for kind in KINDS}
        hooks = []
        for index, layer in enumerate(self.layers):
            for kind in ("q_proj", "o_proj"):

                def add(_: object, args: tuple[Tensor, ...], index: int = index, kind: str = kind) -> None:
                    x = args[0].flatten(0, -2)
                    moments[kind][index] = moments[kind][index] + (x.T @ x).double() / windows.numel()

                hooks.append(getattr(layer, kind).register_forward_pre_hook(add))
        for window in windows.split(2):
            self.model(input_ids=window, use_cache=False)
        for hook in hooks:
            hook.remove()
        found = {kind: torch.stack(moments[kind]) for kind in ("q_proj", "o_proj")}
        for metric in found.values():
            diagonal = metric.diagonal(dim1=1, dim2=2)
            diagonal += RIDGE * diagonal.mean(1, keepdim=True)
        return {kind: found["o_proj" if kind == "o_proj" else "q_proj"] for kind in KINDS}

    @torch.no_grad()
    def put(self, weights: Weights) -> None:
        """Give the model these weights, and its own for the kinds that are not named."""
        for kind, matrices in {**self.weights, **weights}.items():
            for layer, matrix in zip(self.layers, matrices, strict=True):
                getattr(layer, kind).weight.copy_(matrix)

    @torch.no_grad()
    def nll(self, windows: Tensor) -> float:
        """NLL per token."""
        lost = 0.0
        for window in windows.split(2):
            logits = self.model(input_ids=window, use_cache=False).logits[:, :-1]
            lost += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()) * len(window)
            )
        return lost / len(windows)


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """M^1/2 and M^-1/2."""
    spectrum, axes = torch.linalg.eigh(metric)
    spectrum = spectrum.clamp_min(1e-10 * spectrum.max())
    return (axes * spectrum.sqrt()) @ axes.T, (axes * spectrum.rsqrt()) @ axes.T


def low_rank(attention: Attention, kind: str, kept: float) -> Tensor:
    """Every matrix as a product with `kept` of its parameters."""
    found = []
    for matrix, metric in zip(attention.weights[kind], attention.metrics[kind], strict=True):
        rank = int(kept * matrix.numel() / sum(matrix.shape))
        root, inverse = roots(metric)
        u, s, v = torch.linalg.svd(matrix @ root, full_matrices=False)
        found.append((u[:, :rank] * s[:rank]) @ v[:rank] @ inverse)
    return torch.stack(found)


def plain_atoms(attention: Attention, kind: str, count: int) -> Tensor:
    """The best `count` shared matrices for all layers, each scaled to norm 1, in the Frobenius norm."""
    matrices = attention.weights[kind]
    sizes = matrices.flatten(1).norm(dim=1)
    u, s, v = torch.linalg.svd(matrices.flatten(1) / sizes[:, None], full_matrices=False)
    return (sizes[:, None] * (u[:, :count] * s[:count]) @ v[:count]).view_as(matrices)


def atoms(attention: Attention, kind: str, count: int) -> Tensor:
    """`count` shared matrices by alternating least squares on what the projections give for their inputs."""
    matrices, metrics = attention.weights[kind], attention.metrics[kind]
    scale = attention.energy[kind].reciprocal()
    scale = scale / scale.mean()
    mean = (metrics * scale[:, None, None]).mean(0)
    root, inverse = roots(mean)  # start: the closed form in the mean metric
    u, s, v = torch.linalg.svd((matrices @ root).flatten(1) * scale.sqrt()[:, None], full_matrices=False)
    mixes = u[:, :count] / scale.sqrt()[:, None]
    shared = (s[:count, None] * v[:count]).view(count, *matrices.shape[1:]) @ inverse
    weighted = metrics * scale[:, None, None]
    target = torch.einsum("lk,lmd->kmd", mixes, matrices @ weighted)
    for _ in range(ROUNDS):
        mixes = _mixes(shared, matrices, metrics)
        target = torch.einsum("lk,lmd->kmd", mixes, matrices @ weighted)
        shared = _shared(shared, target, mixes, weighted, inverse @ inverse)
    return torch.einsum("lk,kmd->lmd", _mixes(shared, matrices, metrics), shared)


def _mixes(shared: Tensor, matrices: Tensor, metrics: Tensor) -> Tensor:
    """The best coefficients `[L, K]` for shared matrices `[K, m, D]`."""
    found = []
    for matrix, metric in zip(matrices, metrics, strict=True):
        seen = shared @ metric
        gram = torch.einsum("kmd,jmd->kj", seen, shared)
        found.append(torch.linalg.lstsq(gram, torch.einsum("kmd,md->k", seen, matrix)[:, None]).solution[:, 0])
    return torch.stack(found)


def _shared(start: Tensor, target: Tensor, mixes: Tensor, weighted: Tensor, inverse: Tensor) -> Tensor:
    """The best shared matrices for coefficients: conjugate gradients with the mean metric's inverse before them."""

    def normal(x: Tensor) -> Tensor:
        return torch.einsum("lk,lmd->kmd", mixes, torch.einsum("lk,kmd->lmd", mixes, x) @ weighted)

    x, rest = start, target - normal(start)
    step = ahead = rest @ inverse
    size = (rest * ahead).sum()
    for _ in range(CG_STEPS):
        if size <= 1e-12:
            break
        seen = normal(step)
        length = size / (step * seen).sum()
        x, rest = x + length * step, rest - length * seen
        ahead = rest @ inverse
        step, size = ahead + (rest * ahead).sum() / size * step, (rest * ahead).sum()
    return x


def shared_heads(attention: Attention, kept: float) -> tuple[Weights, Weights]:
    """DirectShare, and the same heads dropped."""
    config, weights = attention.model.config, attention.weights
    layers, n, d = len(attention.layers), config.num_key_value_heads, attention.layers[0].head_dim
    group = config.num_attention_heads // n
    heads = {kind: weights[kind].view(layers * n, -1, weights[kind].shape[2]) for kind in KINDS[:3]}
    output = weights["o_proj"].view(layers, -1, n, group * d).transpose(1, 2).flatten(0, 1)  # [L n, D, q d]
    own = torch.cat([heads["q_proj"], heads["k_proj"]], dim=1).flatten(1)
    own = own / own.norm(dim=1, keepdim=True)
    owner = torch.arange(layers * n)
    for first, second in _most_alike(own @ own.T, n, round((1 - kept) * layers * n)):
        owner[second] = first
    lost = owner != torch.arange(layers * n)
    found = {kind: each[owner].view_as(weights[kind]) for kind, each in heads.items()}

    def whole(each: Tensor) -> Tensor:
        return each.unflatten(0, (layers, n)).transpose(1, 2).reshape(weights["o_proj"].shape)

    return {**found, "o_proj": whole(output[owner])}, {"o_proj": whole(output * ~lost[:, None, None])}


def _most_alike(similarity: Tensor, n: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Pairs (kept, replaced) of heads of two layers but the first; no replaced head is another one's copy."""
    kept, replaced = set[int](), set[int]()
    for pair in similarity.triu(1).flatten().argsort(descending=True).tolist():
        first, second = divmod(pair, len(similarity))
        if len(replaced) == wanted:
            return
        if first >= n and second // n > first // n and first not in replaced and second not in kept | replaced:
            kept.add(first)
            replaced.add(second)
            yield first, second


def calibration_and_test(model: Path, train: str, validation: list[str], arguments: Any) -> list[Tensor]:
    """Windows of the calibration text and of every validation text."""
    tokenizer, found = load_tokenizer(model), []
    for text, count in ((train, arguments.windows), *((each, arguments.test) for each in validation)):
        documents = read_documents(text, seed=0, tokenizer=tokenizer)
        found.append(varied_windows(documents, tokenizer, arguments.length, count, 0, required=2, where=text))
    return found


def main() -> None:
    """Print a row for each share of the parameters and kind of projection."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True, nargs="+")
    parser.add_argument("--kept", nargs="+", type=Fraction, default=[Fraction(5, 6), Fraction(2, 3)])
    parser.add_argument("--projections", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--test", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calibration, *tests = calibration_and_test(arguments.model, arguments.train, arguments.validation, arguments)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    attention = Attention(model, calibration)
    source = [attention.nll(test) for test in tests]

    def row(kept: Fraction, name: str, weights: Weights) -> None:
        attention.put(weights)
        gaps = [f"{attention.nll(test) - own:.3f}" for test, own in zip(tests, source, strict=True)]
        print(f"| {kept} | {name} | {' | '.join(gaps)} |", flush=True)

    print(f"| 1 | source NLL | {' | '.join(f'{nll:.3f}' for nll in source)} |", flush=True)
    for kept in arguments.kept:
        count = round(kept * len(attention.layers))
        methods = {
            "low rank": {kind: low_rank(attention, kind, float(kept)) for kind in arguments.projections},
            "atoms": {kind: atoms(attention, kind, count) for kind in arguments.projections},
            "atoms, plain": {kind: plain_atoms(attention, kind, count) for kind in arguments.projections},
        }
        for name, found in methods.items():
            for kind in found:
                row(kept, f"{name}: {kind}", {kind: found[kind]})
            if len(found) > 1:
                row(kept, f"{name}: together", found)
        shared, dropped = shared_heads(attention, float(kept))
        row(kept, "shared heads", shared)
        row(kept, "dropped heads", dropped)


if __name__ == "__main__":
    main()
