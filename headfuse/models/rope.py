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


def frequencies(config: Any, kind: str | None = None) -> tuple[list[float], float]:
    """Radians per position of each rotary plane `[rotary_dim / 2]`, and the factor on the cosines and sines.

    Args:
        config: a transformers config with `rope_parameters`.
        kind: of the layer, one of `layer_types`, where each kind has parameters of its own.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters if kind is None else config.rope_parameters[kind]
    rope_type = rope.get("rope_type") or "default"
    if rope_type != "default":
        of_kind = {} if kind is None else {"layer_type": kind}
        inverse, factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", **of_kind)
        return inverse.double().tolist(), float(factor)
    return stock_frequencies(rope["rope_theta"], head_layout(config).rotary_dim), 1.0


def layer_kind(config: Any, layer_idx: int) -> str:
    """What a layer attends to, in the words of `layer_types`: `sliding_attention` has the window of the config."""
    if getattr(config, "sliding_window", None) is None:
        return "full_attention"
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" if kinds is None else str(kinds[layer_idx])


def turns(config: Any, layer_idx: int) -> bool:
    """Whether RoPE turns the queries and keys of a layer: some families leave it out in some layers."""
    from headfuse.modeling.configuration_family import FAMILIES

    if not (getattr(config, "no_rope_layers", None) or [True] * config.num_hidden_layers)[layer_idx]:
        return False
    everywhere = not FAMILIES[config.model_type].rotates_in_windows or getattr(config, "sliding_window", None) is None
    return everywhere or layer_kind(config, layer_idx) == "sliding_attention"


def stock_frequencies(theta: float, rotary_dim: int) -> list[float]:
    """Radians per position of the planes of RoPE without scaling, fastest first."""
    return [theta ** (-2 * plane / rotary_dim) for plane in range(rotary_dim // 2)]


def slow_planes(config: Any, layer_idx: int, positions: int | None = None) -> list[float]:
    """The mean square of the angle between two positions on each of a layer's slowest rotary planes, radians squared.

    Slowest are those that turn by at most `STILL` over L positions, which are the last ones. L is what the layer can
    attend to: all positions, or those of its sliding window. Attention falls off about inversely with the distance, so
    the mean is over distances from 1 to L with equal weight on a logarithmic scale: (angle over L)^2 / (2 ln L). All,
    with angle 0, in a layer without RoPE. None where frequencies depend on the length of the text, where RoPE scales
    what it rotates, and where a family's RoPE has no parameters.

    Args:
        config: a transformers config.
        layer_idx: the layer.
        positions: fewer than those of the model.
    """
    arch, rope = architecture_of(config.model_type), getattr(config, "rope_parameters", None) or {}
    kind = layer_kind(config, layer_idx)
    own_rope = isinstance(rope.get(kind), dict)
    rope, positions = rope[kind] if own_rope else rope, positions or getattr(config, "max_position_embeddings", None)
    if arch.rotary != "none" and not turns(config, layer_idx):
        return [0.0] * (head_layout(config).rotary_dim // 2)
    if arch.rotary == "none" or not positions or positions < 2 or "rope_theta" not in rope:
        return []
    if (rope.get("rope_type") or "default") not in STATIC:
        return []
    if kind == "sliding_attention":
        positions = min(positions, max(2, config.sliding_window))
    per_position, factor = frequencies(config, kind if own_rope else None)
    angles = [positions * turn for turn in per_position]
    slowest = [angle**2 / (2 * math.log(positions)) for angle in angles if angle <= STILL]
    falling = all(math.isfinite(angle) for angle in angles) and angles == sorted(angles, reverse=True)
    return slowest if factor == 1.0 and falling else []
