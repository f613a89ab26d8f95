"""A source model, and the folder in which a run is interrupted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import run

LAYERS = 16
"""Enough that a run goes on for a while after its first layers are done."""


OPTIONS = ("--layout", "decoupled", "--budget", "0.5", "--samples", "8", "--sequence-length", "32")


READERS = ("--layout", "latent", "--cross-layer", "2", *OPTIONS[2:])


PATIENCE = 300.0
"""Seconds; only a machine that hangs takes so long."""


@dataclass
class Workplace:
    """A source model, the files of an uninterrupted run on it, and the folder that a test works in."""

    model: Path
    text: Path
    whole: Path
    out: Path
    options: tuple[str, ...] = OPTIONS

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def done(self) -> Path:
        return self.partial / "state" / "done.json"

    def line(self, *args: object) -> list[str]:
        return [
            "fuse",
            *map(str, (self.model, "-o", self.out, "--data", self.text, "--threads", 1, *self.options, *args)),
        ]

    def fuse(self, *args: object, code: int = 0) -> str:
        """The command to its end, in this process."""
        return run(*self.line(*args), code=code)

    def assert_whole(self) -> None:
        """The output equals that of a run that nobody interrupted."""
        for name in ("model.safetensors", "plan.json", "config.json", "README.md", "headfuse.yaml"):
            assert (self.out / name).read_bytes() == (self.whole / name).read_bytes(), name
        assert {file.name for file in self.out.iterdir()} == {file.name for file in self.whole.iterdir()}
        assert not self.partial.exists()


def layers_done(place: Workplace) -> int:
    try:
        return len(json.loads(place.done.read_text()))
    except FileNotFoundError:
        return 0


def stop_after(place: Workplace, layers: int, *args: object) -> None:
    """Run the command in this process until a layer is recorded, then stop it as Ctrl-C does."""
    from headfuse.conversion.resume import FinishedLayers

    add = FinishedLayers.add

    def interrupted(self: FinishedLayers, layer_idx: int) -> None:
        add(self, layer_idx)
        if layer_idx + 1 == layers:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinishedLayers, "add", interrupted)
        place.fuse(*args, code=130)
