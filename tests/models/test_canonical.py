"""Packed projections, read apart."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from headfuse.models.canonical import CanonicalCheckpoint
from headfuse.models.families import architecture_of
from headfuse.models.source import Source
from tests.support.tiny_models import tiny_model


def test_two_threads_read_packed_projections(tmp_path: Path) -> None:
    """Each gets the layer that it asks for, whatever the other one reads between its lines."""
    source = Source.open(tiny_model(tmp_path / "model", "gpt2"))
    checkpoint = CanonicalCheckpoint(source.checkpoint, architecture_of("gpt2"), source.heads)
    names = [name for name in checkpoint.parts if name.endswith("weight")]
    alone = {name: checkpoint.read(name) for name in names}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            halves = names[: len(names) // 2], names[len(names) // 2 :]  # of other layers
            found = list(pool.map(lambda half: [(name, checkpoint.read(name)) for name in half * 200], halves))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(tensor, alone[name]) for half in found for name, tensor in half)
