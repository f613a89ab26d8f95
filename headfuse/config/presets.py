"""PRESETS: how much work `fuse` spends on quality, on top of the closed form. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """The stages of a preset; the refinement is kept only if it lowers the loss on held-out text."""

    cost: str
    """The work of the preset and its cost in forward passes over the calibration text."""
    end_loss_probes: Literal["few", "all"] | None = None
    """Counts whose cost is measured by the end loss; `few`: powers of two (mathematics.md section 8.4)."""
    model_passes: float = 0.0
    """Passes over the text that refine the attention of the whole model towards the source's output distribution."""


PRESETS: dict[str, Preset] = {
    "fast": Preset("closed form, about 3 forward passes over the text"),
    "balanced": Preset("also refines all layers together, at most 15 passes", "few", 2.0),
    "best": Preset("measures every head count, at about the same cost; use 128 samples", "all", 2.0),
}
