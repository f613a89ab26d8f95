"""Means of measurements on a sample, with their standard errors. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (None if a single cluster cannot give one), and its number of items."""

    value: float
    stderr: float | None
    samples: int


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent items; NaN if there are none."""
    count = len(values)
    centre = math.fsum(values) / count if count else math.nan
    squares = math.fsum((value - centre) * (value - centre) for value in values)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else None
    return Estimate(centre, error, count)


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent means; its number of items is their total."""
    errors = [part.stderr for part in parts if part.stderr is not None]
    error = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    return Estimate(math.fsum(part.value for part in parts) / len(parts), error, sum(part.samples for part in parts))


def average(values: Sequence[float]) -> float | None:
    """The mean alone; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def clustered_mean(values: torch.Tensor, chosen: torch.Tensor) -> Estimate | None:
    """The mean over chosen predictions; its standard error treats predictions of a window as dependent.

    Args:
        values: `[windows, predictions]`, float64.
        chosen: `[windows, predictions]`, bool.

    Returns:
        None when nothing is chosen. With as many predictions in every window the error is the standard deviation of the
        windows' means divided by the square root of their number.
    """

    count, windows = int(chosen.sum()), int(chosen.any(dim=1).sum())
    if not count:
        return None
    centre = values[chosen].mean()
    sums = (values - centre).masked_fill(~chosen, 0).sum(dim=1)
    error = math.sqrt(sums.square().sum().item() * windows / (windows - 1)) / count if windows > 1 else None
    return Estimate(centre.item(), error, count)


def paired_stderr(model: float | None, baseline: float | None, difference: float | None, factor: float) -> float | None:
    """Standard error of `model - factor * baseline` from those of the model, the baseline and their difference.

    The three errors fix the covariance, so that the questions themselves need not be kept:
    `var(m - f b) = var(m) + f^2 var(b) - f (var(m) + var(b) - var(m - b))`.
    """
    if model is None or baseline is None or difference is None:
        return None
    variance = model**2 + factor**2 * baseline**2 - factor * (model**2 + baseline**2 - difference**2)
    return math.sqrt(max(0.0, variance))
