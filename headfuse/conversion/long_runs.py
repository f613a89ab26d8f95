"""Advice before a conversion that will take hours on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headfuse.choices import ComputeDtype
from headfuse.config.fuse import FuseConfig
from headfuse.config.presets import PRESETS
from headfuse.conversion.cost import seconds_at
from headfuse.fusion import FUSION_METHODS
from headfuse.models.source import Source
from headfuse.models.speed import Speed, measured_speed

LONG = 3600.0
"""Runs of at least this many seconds are long."""
NARROWER, FASTER = "--compute-dtype bfloat16", 1.3
"""Products that lose nothing (docs/gpu.md), and how much faster they have to be."""
FEW_SAMPLES = 16
"""Calibration windows that are enough for preset `fast`."""


def advice(
    source: Source, config: FuseConfig, compute_dtype: ComputeDtype, device: torch.device, speed: Speed
) -> str | None:
    """Estimated time of a run of over an hour, and options that take less; None for shorter runs.

    Args:
        source: the opened source.
        config: the options of the conversion.
        compute_dtype: what layers multiply in.
        device: where it runs.
        speed: of this device and dtype.
    """
    seconds = seconds_at(speed, source, config)
    if seconds < LONG:
        return None
    head, narrower = f"about {duration(seconds)} on this machine", _narrower(config, compute_dtype, device, speed)
    ways = list(_cheaper(config))
    if narrower is not None:
        ways = [(NARROWER, config), *((f"{NARROWER} {words}", other) for words, other in ways)]
    timed = [(words, seconds_at(narrower or speed, source, other)) for words, other in ways]
    timed = [(words, took) for words, took in timed if took < seconds]
    if not timed:
        return f"{head}; a GPU, or a smaller --sequence-length, takes less"
    fits = next((way for way in timed if way[1] < LONG), timed[-1])
    named = [timed[0], fits] if narrower is not None and fits != timed[0] else [fits]
    return "; ".join([head, *(f"{words} takes about {duration(took)}" for words, took in named)])


def _narrower(config: FuseConfig, compute_dtype: ComputeDtype, device: torch.device, speed: Speed) -> Speed | None:
    """The speed with products in bfloat16, where they are not chosen and are clearly faster."""
    if compute_dtype != "float32" or FUSION_METHODS[config.method].trained:
        return None
    in_bfloat16 = measured_speed(device, "bfloat16")
    return Speed(speed.float32, in_bfloat16) if in_bfloat16 > FASTER * speed.float32 else None


def duration(seconds: float) -> str:
    """A duration in words, in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cheaper(config: FuseConfig) -> Iterator[tuple[str, FuseConfig]]:
    """Options that take less time, those with the best result first."""
    if FUSION_METHODS[config.method].trained:
        return
    order = list(PRESETS)
    for preset in reversed(order[: order.index(config.preset)]):
        yield f"--preset {preset}", config.model_copy(update={"preset": preset})
    if config.calibration.samples > FEW_SAMPLES:
        few = config.calibration.model_copy(update={"samples": FEW_SAMPLES})
        words = f"--preset fast --samples {FEW_SAMPLES}"
        yield words, config.model_copy(update={"preset": "fast", "calibration": few})
