"""Packed projections, read apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from headfuse.models.canonical import CanonicalCheckpoint
from headfuse.models.families import architecture_of
from headfuse.models.source import Source
from tests.support.tiny_models import tiny_model


class Interrupted(CanonicalCheckpoint):
    """Another layer is read as soon as a split is kept, as a thread may do."""

    other: str | None = None

    @property
    def _split(self) -> Any:
        return self._kept

    @_split.setter
    def _split(self, value: Any) -> None:
        self._kept = value
        other, self.other = self.other, None
        if other is not None:
            self.read(other)


def test_a_read_is_of_its_own_layer_whatever_a_thread_reads(tmp_path: Path) -> None:
    source = Source.open(str(tiny_model(tmp_path / "model", "bloom")))
    arguments = source.checkpoint, architecture_of("bloom"), source.heads
    alone, checkpoint = CanonicalCheckpoint(*arguments), Interrupted(*arguments)
    first, *_, last = (name for name in alone.parts if name.endswith("weight"))
    checkpoint.other = last
    assert torch.equal(checkpoint.read(first), alone.read(first))
