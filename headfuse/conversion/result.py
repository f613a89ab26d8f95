"""The result of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headfuse.estimates import average
from headfuse.plan import FusionPlan


@dataclass(frozen=True)
class Stage:
    """One stage of a conversion: NLL of each held-out window after it, and whether its weights were kept."""

    name: str
    held_out: tuple[float, ...]
    kept: bool = True

    @property
    def nll(self) -> float | None:
        """Mean NLL of the held-out windows; None if no text is held out."""
        return average(self.held_out)


@dataclass(frozen=True)
class FuseResult:
    """What a conversion wrote, and the NLL of held-out calibration text before and after."""

    output: Path
    plan: FusionPlan
    stages: tuple[Stage, ...]
    held_out_before: tuple[float, ...]
    """NLL of each held-out window with the source's weights."""
    kv_bytes_before: int
    kv_bytes_after: int
    kv_bytes_in: dict[str, tuple[int, int]]
    """Cache bytes of a token in each runtime that loads the layout: of the source, and of the fused model."""

    @property
    def held_out_after(self) -> tuple[float, ...]:
        """NLL of each held-out window with the written weights."""
        return [stage.held_out for stage in self.stages if stage.kept][-1]

    @property
    def nll_before(self) -> float | None:
        """Mean NLL of the held-out windows with the source's weights."""
        return average(self.held_out_before)

    @property
    def nll_after(self) -> float | None:
        """Mean NLL of the held-out windows with the written weights."""
        return average(self.held_out_after)
