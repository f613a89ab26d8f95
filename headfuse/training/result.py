"""The result of `uptrain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headfuse.config.uptrain import UptrainConfig


@dataclass(frozen=True)
class UptrainResult:
    """What `uptrain` did; the NLL figures are per token on held-out windows of the text, None where it is too short."""

    output: Path
    teacher: str | None
    data: str
    recipe: UptrainConfig
    processes: int
    steps: int
    best_step: int
    tokens: int
    epochs: int
    seconds: float
    tokens_per_second: float
    validation_windows: int
    nll_before: float | None
    nll_after: float | None
    nll_teacher: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "output": str(self.output), "recipe": self.recipe.named()}
