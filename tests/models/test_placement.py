"""What stays on a device between two uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headfuse.models import placement
from headfuse.models.families import ARCHITECTURES
from headfuse.models.placement import DeviceMemory
from tests.support.commands import run
from tests.support.tiny_models import tiny_model

SHAPES = {
    "model.embed_tokens.weight": (10, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.layers.1.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.mlp.up_proj.weight": (8, 4),
}
MEMORY = DeviceMemory.of(SHAPES, dict.fromkeys(SHAPES, torch.float16), ARCHITECTURES["llama"], 2, 1)


def test_bytes_are_those_of_the_shapes() -> None:
    assert MEMORY.work == 4 * (40 + 3 * 48) + placement.WORK_PER_TOKEN
    assert MEMORY.optimizer == 12 * 32
    assert MEMORY.layers == 2 * (96 + 32)


@pytest.mark.parametrize(
    ("free", "chosen"),
    [(10**6, "resident"), (MEMORY.needed("streamed") / placement.USABLE + 1, "streamed"), (10, "host"), (None, "host")],
)
def test_the_placement_keeps_the_most_that_fits(
    free: float | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda device: free)
    device = torch.device("cuda")
    assert MEMORY.choose("auto", device) == chosen
    assert MEMORY.choose("resident", device) == "resident"
    assert MEMORY.choose("resident", torch.device("cpu")) == "host"


def test_a_dry_run_on_the_cpu_names_no_device(tmp_path: Path) -> None:
    sizes = "--data", tmp_path / "text.txt", "--samples", 4, "--sequence-length", 16
    line = run("fuse", tiny_model(tmp_path / "model"), *sizes, "--dry-run", "--device", "cpu", "--json").splitlines()[
        -1
    ]
    assert json.loads(line)["estimate"]["device"] is None
