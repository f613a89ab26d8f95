"""What a conversion moves between host and device, and how often the host waits: budgets that more text does not raise.

Counted on a model of two layers whose weights are float16, on a pretended device or a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import headfuse
from headfuse.checkpoint.reader import Checkpoint
from headfuse.conversion import refine
from tests.support.pretended_cuda import Transfers
from tests.support.tiny_models import tiny_model

LAYERS = 2
Report = dict[str, Any]


def converted(folder: Path, samples: int, preset: str, **options: Any) -> Report:
    """What is counted while a model with half of its heads is made; two windows of sixteen tokens are held out."""
    model = tiny_model(folder / "model", dtype="float16") if not (folder / "model").exists() else folder / "model"
    calibration = {"samples": samples, "sequence_length": 16, "held_out": 2 / samples, "data": str(folder / "text.txt")}
    counts = {"total": None, "key_heads": (2, 2), "value_heads": (2, 2)}
    with Transfers() as count:
        headfuse.fuse(
            model, budget=counts, preset=preset, device="cuda", calibration=calibration,
            output=folder / f"{samples}-{preset}", **options,
        )  # fmt: skip
    return count.report()


def times(report: Report, kind: str) -> int:
    """How often; the tables of the fused attention are left out, as their number is that of its groups."""
    places = report["copies"].get(kind, {"places": {}})["places"]
    return sum(count for place, (count, _) in places.items() if not place.startswith("modeling/"))


KINDS = ("to device", "to host", "read", "shaped by data")


def test_more_windows_cost_no_more_waits(tmp_path: Path) -> None:
    few, many = (converted(tmp_path, samples, "fast") for samples in (18, 66))
    for kind in KINDS:
        assert times(many, kind) == times(few, kind)
        assert times(many, kind) <= 40 * LAYERS


def test_weights_travel_once(tmp_path: Path) -> None:
    """Down comes what is written, in its dtype, and the refined weights in float32; up goes the model."""
    report = converted(tmp_path, 10, "balanced", placement="resident")
    source, fused = (Checkpoint(tmp_path / name) for name in ("model", "10-balanced"))
    outer = sum(source.read(name).nbytes for name in source.shapes if ".layers." not in name)
    refined = sum(2 * fused.read(name).nbytes for name in fused.shapes if ".self_attn." in name)
    assert report["copies"]["to device"]["bytes"] < 1.2 * sum(source.read(name).nbytes for name in source.shapes)
    written = sum(fused.read(name).nbytes for name in fused.shapes) - outer
    assert report["copies"]["to host"]["bytes"] < 1.2 * (written + refined)
    float64 = sum(work for name, work in report["work"].items() if name in ("cpu float64", "cpu complex128"))
    assert float64 < 0.01 * sum(report["work"].values())


def test_a_step_of_refinement_waits_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the masks of transformers, in the embedding and in the head; up go the tokens of its window."""
    steps, counted = list[int](), Transfers()
    own: Callable[..., None] = refine.refine_model

    def refine_model(*args: Any) -> None:
        *others, on_step, wide = args

        def note(done: int, total: int) -> None:
            steps.append(done)
            on_step(done, total)

        with counted:
            own(*others, note, wide)

    monkeypatch.setattr(refine, "refine_model", refine_model)
    converted(tmp_path, 10, "balanced", placement="resident")
    report = counted.report()
    assert len(steps) >= 8
    assert times(report, "to device") <= len(steps)
    assert times(report, "to host") == 0
    assert times(report, "read") <= 2 * len(steps)
