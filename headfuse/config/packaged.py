"""Finds the YAML files that come with the package: configs, and below them gates and recipes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # from Python 3.11 on


def packaged(folder: str = "") -> dict[str, Traversable]:
    """The files of a folder of `configs/` by name, without `.yaml`; `folder` is "" for the configs of `fuse`."""
    root: Traversable = resources.files("headfuse") / "configs"
    if not root.is_dir():  # in a checkout it lies beside the package
        root = Path(__file__).parents[2] / "configs"
    place = root / folder if folder else root
    files = list(place.iterdir()) if place.is_dir() else []
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}
