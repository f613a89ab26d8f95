"""Spectra of a layer's projections and of what it caches, and how well they predict the measured costs.

The projections are held against random matrices: singular values of a matrix of independent numbers end at the
Marchenko-Pastur edge, so what lies above it was learned. What a layer caches is decomposed as layout latent does it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from headfuse.fusion.moments import key_moments, value_moments
from headfuse.fusion.wide import KeyBasis, key_basis, plain_basis
from headfuse.models.placement import widened
from headfuse.models.source_layer import SourceLayer
from headfuse.plan import HeadLayout

OUTLIER = 10.0
"""A channel whose mean square is more than this many times that of the side's median channel is an outlier."""
ENERGY = 0.99
"""Share of the energy that `channels_99` hold."""
FEWEST = 4
"""Layers below which a rank correlation says nothing."""
FIGURES = ("rank_above_edge", "product_rank", "effective_rank", "channels_99", "outlier_channels")
"""The numbers of `SideSpectrum` that are compared with the costs."""


@dataclass(frozen=True)
class SideSpectrum:
    """One layer's keys, or its values.

    Attributes:
        singular_values: of the projection `[n d, D]`, falling, in units of the Marchenko-Pastur edge.
        product_rank: singular values above the edge of the product of two projections, the mean over query heads: of
            queries and keys, or of values and output.
        energy: what the scores, or the output, lose without each component of what is cached, as shares of the whole,
            falling; a component is a channel of the cache.
        outlier_channels: cached channels that are much larger than the median one.
    """

    singular_values: list[float]
    product_rank: float
    energy: list[float]
    outlier_channels: int

    @property
    def rank_above_edge(self) -> int:
        """Singular values of the projection that a random matrix would not have."""
        return sum(value > 1 for value in self.singular_values)

    @property
    def effective_rank(self) -> float:
        """Channels that are in use: the exponential of the entropy of the energy (Roy and Vetterli, 2007)."""
        return math.exp(-sum(share * math.log(share) for share in self.energy if share > 0))

    @property
    def channels_99(self) -> int:
        """The fewest channels that hold 99% of the energy."""
        sums = itertools.accumulate(self.energy)
        return 1 + sum(held < ENERGY * sum(self.energy) for held in sums)


@dataclass(frozen=True)
class LayerSpectrum:
    """The spectra of one layer."""

    key: SideSpectrum
    value: SideSpectrum


@dataclass(frozen=True)
class Spectrum:
    """The spectra of every layer, and Spearman's rank correlation of their figures with the measured costs.

    `correlation[side][figure]` is over the layers of a side; None without measured costs, or where all are equal.
    """

    layers: list[LayerSpectrum]
    correlation: dict[str, dict[str, float | None]]


def layer_spectrum(layer: SourceLayer, heads: HeadLayout) -> LayerSpectrum:
    """The spectra of a source layer on the calibration text that it captured."""
    weights, captures = layer.weights, layer.captures
    query, key, value = (widened(part) for part in (weights.query, weights.key, weights.value))
    output = widened(weights.output).permute(1, 2, 0)  # [n_q, d, D]
    whole = [capture for capture in captures if capture.weight == 1]  # not the short windows at the start of texts
    values = plain_basis(value_moments(captures, weights.output, heads, None)).energy
    sides = []
    for projection, other, energy, cached in (
        (key, query, _channel_energy(key_basis(key_moments(captures, heads))), [c.key for c in whole]),
        (value, output, values, [c.value for c in whole]),
    ):
        squares = torch.cat([widened(x).square().mean(2) for x in cached]).mean(0).flatten()  # [n d]
        sides.append(
            SideSpectrum(
                in_edges(projection.flatten(0, 1)).tolist(),
                product_rank(other, projection),
                (energy / energy.sum().clamp_min(1e-300)).tolist(),
                int((squares > OUTLIER * squares.median()).sum()),
            )
        )
    return LayerSpectrum(*sides)


def _channel_energy(basis: KeyBasis) -> torch.Tensor:
    """`[c]`: the energy of each cached channel; the two channels of a slot share that of the slot."""
    slots = basis.energy.repeat_interleave(2) / 2
    rest = slots.new_empty(0) if basis.plain is None else basis.plain.energy
    return torch.cat([slots, rest]).sort(descending=True).values


def in_edges(matrix: torch.Tensor) -> torch.Tensor:
    """Singular values of a matrix, falling, in units of the edge of its noise."""
    values = torch.linalg.svdvals(matrix)
    return values / _edge(values, matrix.shape[-2:])


def product_rank(first: torch.Tensor, second: torch.Tensor) -> float:
    """Singular values of `first_h^T second_kv(h)` above the edge, the mean over heads h.

    The largest singular value of a product is at most the product of the largest ones, so the edge is the product of
    the two edges.

    Args:
        first: `[n_q, d, D]`.
        second: `[n, d, D]`, n divides n_q.
    """
    edges = [_edge(torch.linalg.svdvals(each), each.shape[-2:]) for each in (first, second)]
    small = [torch.linalg.qr(each.mT).R for each in (first, second)]  # same products, without the width D
    repeats = len(first) // len(second)
    values = torch.linalg.svdvals(small[0] @ small[1].repeat_interleave(repeats, 0).mT)
    return float((values > edges[0] * edges[1].repeat_interleave(repeats, 0)).sum() / len(first))


def _edge(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`[..., 1]`: the Marchenko-Pastur edge of matrices with singular values `[..., k]`.

    The size of the noise is that of random matrices with the same median singular value (Gavish and Donoho, arXiv
    1305.5870), so at most half of the values may be above the edge.
    """
    ratio = min(shape) / max(shape)
    edge = values.median(-1, keepdim=True).values * (1 + ratio**0.5) / marchenko_pastur_median(ratio) ** 0.5
    largest = values[..., :1]
    return torch.maximum(edge, torch.where(largest > 0, largest * 1e-12, torch.ones_like(largest)))


@cache
def marchenko_pastur_median(ratio: float) -> float:
    """Median eigenvalue of X X^T / m, with X `[ratio m, m]` of independent numbers of variance 1; 0 < ratio <= 1."""
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    angles = torch.linspace(0, math.pi, 4097, dtype=torch.float64)
    middle = (angles[1:] + angles[:-1]) / 2
    at = (low + high) / 2 - (high - low) / 2 * middle.cos()
    mass = ((high - low) / 2 * middle.sin()).square() / at  # density times dx, up to a factor
    share = mass.cumsum(0) / mass.sum()
    return float(at[(share < 0.5).sum()])


def rank_correlation(figures: Sequence[float], costs: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for few numbers, or where one of the two does not vary."""
    pairs = [_ranks(figures), _ranks(costs)]
    if len(figures) < FEWEST or any(bool((ranks == ranks[0]).all()) for ranks in pairs):
        return None
    return float(torch.corrcoef(torch.stack(pairs))[0, 1])


def _ranks(numbers: Sequence[float]) -> torch.Tensor:
    """Ranks, with the mean rank for equal numbers."""
    x = torch.tensor(numbers, dtype=torch.float64)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2


def predictions(
    layers: Sequence[LayerSpectrum], costs: Mapping[str, Sequence[float]] | None
) -> dict[str, dict[str, float | None]]:
    """How each figure ranks the layers of a side, against their costs; `costs[side]` holds one for each layer."""
    found = dict[str, dict[str, float | None]]()
    for side in ("key", "value"):
        spectra = [getattr(layer, side) for layer in layers]
        found[side] = {
            name: None if costs is None else rank_correlation([getattr(s, name) for s in spectra], costs[side])
            for name in FIGURES
        }
    return found


def plot_spectrum(found: Spectrum, kept: Mapping[str, Sequence[int]], path: Path) -> None:
    """Spectra of all layers, and effective ranks beside the channels that the plan keeps, as a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 2, figsize=(9, 9), layout="constrained")
    colours = pyplot.get_cmap("viridis")(torch.linspace(0, 1, len(found.layers)).tolist())
    for column, side in enumerate(("key", "value")):
        spectra = [getattr(layer, side) for layer in found.layers]
        for spectrum, colour in zip(spectra, colours, strict=True):
            axes[0][column].plot(spectrum.singular_values, color=colour, linewidth=1)
            left = [1 - held for held in itertools.accumulate(spectrum.energy, initial=0.0)]
            axes[1][column].plot([max(share, 1e-6) for share in left], color=colour, linewidth=1)
        axes[0][column].axhline(1, color="black", linestyle="--", linewidth=1)
        axes[0][column].set(title=f"{side} projection, in Marchenko-Pastur edges", yscale="log", xlabel="rank")
        axes[1][column].set(title=f"{side} energy lost", yscale="log", xlabel="channels kept")
        axes[2][column].plot([s.effective_rank for s in spectra], marker="o", label="effective rank")
        axes[2][column].plot([s.channels_99 for s in spectra], marker="s", label="99% of the energy")
        axes[2][column].step(range(len(spectra)), kept[side], where="mid", color="black", label="kept by the plan")
        axes[2][column].set(title=f"{side} channels", xlabel="layer")
        axes[2][column].legend(fontsize=8)
    figure.suptitle("Spectra of the layers, dark to light: first to last")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
