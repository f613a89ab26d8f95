"""Advice before a conversion that will take hours on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from headfuse.config.fuse import FuseConfig
from headfuse.config.presets import PRESETS
from headfuse.conversion.cost import seconds_at
from headfuse.fusion import FUSION_METHODS
from headfuse.models.source import Source

LONG = 3600.0
"""Runs of at least this many seconds are long."""
FEW_SAMPLES = 16
"""Calibration windows that are enough for preset `fast`."""


def advice(source: Source, config: FuseConfig, speed: float) -> str | None:
    """Estimated time of a run of over an hour, and options that take less; None for shorter runs.

    Args:
        source: the opened source.
        config: the options of the conversion.
        speed: floating-point operations per second of a matrix product.
    """
    seconds = seconds_at(speed, source, config)
    if seconds < LONG:
        return None
    others = [(words, seconds_at(speed, source, other)) for words, other in _cheaper(config)]
    others = [(words, took) for words, took in others if took < seconds]
    head = f"about {duration(seconds)} on this machine"
    if not others:
        return f"{head}; a GPU, or a smaller --sequence-length, takes less"
    words, took = next((o for o in others if o[1] < LONG), others[-1])
    return f"{head}; {words} takes about {duration(took)}"


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
