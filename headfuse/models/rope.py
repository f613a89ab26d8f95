"""Frequencies of rotary planes, and the planes that hardly turn over the texts that a model reads."""

from __future__ import annotations

import math
from typing import Any

from headfuse.models.families import architecture_of
from headfuse.models.heads import head_layout

STATIC = ("default", "linear", "llama3", "proportional", "yarn")
"""Kinds of RoPE whose frequencies do not depend on the length of the text."""
STILL = 0.5
"""A plane that turns by at most this angle over all positions of a model, in radians, may be read as one that does not
turn. SmolLM2-135M loses 0.004 nats by it at its full length, and 0.015 at 0.7 (docs/experiments/slow-planes.md).
"""


def frequencies(config: Any) -> tuple[list[float], float]:
    """Radians per position of each rotary plane `[rotary_dim / 2]`, and the factor on the cosines and sines.

    Args:
        config: a transformers config with `rope_parameters` for all layers.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type") or "default"
    if kind != "default":
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        return inverse.double().tolist(), float(factor)
    return stock_frequencies(rope["rope_theta"], head_layout(config).rotary_dim), 1.0


def stock_frequencies(theta: float, rotary_dim: int) -> list[float]:
    """Radians per position of the planes of RoPE without scaling, fastest first."""
    return [theta ** (-2 * plane / rotary_dim) for plane in range(rotary_dim // 2)]


def slow_planes(config: Any, positions: int | None = None) -> list[float]:
    """The mean square of the angle between two positions on each of the slowest rotary planes, in radians squared.

    Slowest are those that turn by at most `STILL` over all L positions, which are the last ones. Attention falls off
    about inversely with the distance, so the mean is over distances from 1 to L with equal weight on a logarithmic
    scale: (angle over L)^2 / (2 ln L). None where frequencies depend on the layer or on the length of
    the text, where RoPE scales what it rotates, and where a family's RoPE has no parameters.

    Args:
        config: a transformers config.
        positions: fewer than those of the model.
    """
    arch, rope = architecture_of(config.model_type), getattr(config, "rope_parameters", None) or {}
    positions = positions or getattr(config, "max_position_embeddings", None)
    if arch.rotary == "none" or not positions or positions < 2 or "rope_theta" not in rope:
        return []
    if (rope.get("rope_type") or "default") not in STATIC:
        return []
    turns, factor = frequencies(config)
    slowest = [(positions * turn) ** 2 / (2 * math.log(positions)) for turn in turns if positions * turn <= STILL]
    falling = all(math.isfinite(turn) for turn in turns) and turns == sorted(turns, reverse=True)
    return slowest if factor == 1.0 and falling else []
