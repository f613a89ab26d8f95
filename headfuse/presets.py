"""PRESETS: how much work `fuse` spends on quality, on top of the closed form. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """The stages of a preset; each is kept only if it lowers the loss on held-out text."""

    cost: str
    """The price, as a multiple of one forward pass over the calibration text."""
    end_loss_probes: Literal["few", "all"] | None = None
    """Counts at which the budget's cost table is measured by the end loss; `few`: powers of two (math.md 4)."""
    layer_steps: int = 0
    """Gradient steps on each layer's attention towards the source's attention output (math.md 2)."""
    model_passes: float = 0.0
    """Passes over the text with the attention of the whole model towards the source's output distribution."""


PRESETS: dict[str, Preset] = {
    "fast": Preset("closed form, about 2 forward passes over the text"),
    "best": Preset(
        "refines the whole model in memory, about 10 forward passes", end_loss_probes="all", model_passes=2.0
    ),
}
