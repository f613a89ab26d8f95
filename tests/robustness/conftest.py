"""A tiny model that a test may damage, and one whose conversion is interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.tiny_models import tiny_model
from tests.support.workplace import LAYERS, Workplace, stop_after


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny model that every test copies."""
    return tiny_model(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    shutil.copy(pristine.parent / "text.txt", tmp_path)
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model(folder / "model", layers=LAYERS)
    place = Workplace(model, folder / "text.txt", folder / "whole", folder / "whole")
    place.fuse()
    return place


@pytest.fixture
def place(source: Workplace, tmp_path: Path) -> Workplace:
    return Workplace(source.model, source.text, source.whole, tmp_path / "out")


@pytest.fixture(scope="module")
def remains(source: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `.partial` folder of a run that was stopped after some layers, for every test to copy."""
    place = Workplace(source.model, source.text, source.whole, tmp_path_factory.mktemp("remains") / "out")
    stop_after(place, 5)
    return place.partial


@pytest.fixture
def interrupted(place: Workplace, remains: Path) -> Workplace:
    """A run that was stopped after five layers."""
    shutil.copytree(remains, place.partial)
    return place
