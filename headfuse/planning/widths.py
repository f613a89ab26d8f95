"""The widths that a wide head may have: their steps, the smallest one, and those whose cost is measured."""

from __future__ import annotations

import math
from fractions import Fraction

from headfuse.plan import HeadLayout

WIDEST = 256
"""Channels of the widest head that every attention kernel of today takes."""
LEAST_WIDTH = Fraction(1, 2)
"""Smallest width of a wide head, as a share of the equal width. Costs are measured on little text, and a layer whose
keys they leave narrower fails on text unlike it (docs/experiments/least-widths.md).
"""
LADDER = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Widths whose cost is measured, as shares of all channels of a side; between them the lost energy interpolates."""


def width_quantum(heads: HeadLayout) -> int:
    """Channels of the steps in which the widths of wide heads are chosen."""
    return math.gcd(heads.head_dim, 8 if heads.head_dim <= 32 else 16)


def least_width(given: int | None, share: Fraction, heads: HeadLayout, whole_layers: int = 0) -> int:
    """Fewest channels that a layer keeps of a side: those given, or else LEAST_WIDTH of the equal width.

    Args:
        given: by the option.
        share: of all layers' channels that is kept.
        heads: the source's heads.
        whole_layers: layers that keep all channels; the equal width is that of the others.
    """
    if given is not None:
        return given
    others = heads.num_hidden_layers - whole_layers
    equal = (share * heads.num_hidden_layers - whole_layers) / others if others else Fraction(0)
    return math.floor(LEAST_WIDTH * max(equal, Fraction(0)) * heads.num_key_value_heads * heads.head_dim)


def measured_widths(quanta: int) -> list[int]:
    """The widths below all `quanta` of a side whose cost is measured, in quanta."""
    return sorted({min(max(1, round(share * quanta)), quanta - 1) for share in LADDER} - {0})
