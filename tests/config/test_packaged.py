"""Packaged configs, gates and recipes: the files of configs/, found by name in a checkout and in the wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from headfuse.config.packaged import packaged

ROOT = Path(__file__).parents[2]
FOLDERS = ("", "gates", "recipes")
READ = """
from headfuse.config.fuse import load_config
from headfuse.config.packaged import packaged
from headfuse.config.uptrain import load_recipe
from headfuse.evaluation.gates import read_gates
from headfuse.text.documents import read_documents
import headfuse
print(headfuse.__file__)
for name in packaged():
    print(load_config(name, {}) and name)
for name in packaged("gates"):
    print(read_gates(name) and name)
for name in packaged("recipes"):
    print(load_recipe(name, {"data": "default", "tokens": 1}) and name)
assert next(iter(read_documents("default")))
"""


def names() -> list[str]:
    """The names of the files of configs/, folder by folder."""
    return [path.stem for folder in FOLDERS for path in (ROOT / "configs" / folder).glob("*.yaml")]


def read(folder: Path, where: Path) -> list[str]:
    """The place of the package and the names that it finds, in a process that imports it from a folder."""
    environment = {"PYTHONPATH": str(folder), "HOME": str(where), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", READ], cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder that is not the checkout; built from a copy, as building writes beside it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    kept = ("pyproject.toml", "README.md", "LICENSE", "headfuse", "configs")
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in kept), str(folder)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder / "installed")
    return folder / "installed"


def test_every_file_is_found_in_a_checkout(tmp_path: Path) -> None:
    place, *found = read(ROOT, tmp_path)
    assert Path(place).parents[1] == ROOT
    assert sorted(found) == sorted(names())
    assert len(found) >= 12
    assert packaged("nosuch") == {}


def test_every_file_is_found_in_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    place, *found = read(unpacked, tmp_path)
    assert Path(place).parents[1] == unpacked
    assert sorted(found) == sorted(names())


def test_the_wheel_holds_every_module(unpacked: Path) -> None:
    wanted = {path.relative_to(ROOT) for path in (ROOT / "headfuse").rglob("*.py")}
    assert wanted == {path.relative_to(unpacked) for path in unpacked.rglob("*.py")}
    data = {path.name for path in (unpacked / "headfuse/data").iterdir()}
    assert data == {path.name for path in (ROOT / "headfuse/data").iterdir()}
    assert not any(name.endswith(".yaml") for name in data)
    assert (unpacked / "headfuse/py.typed").is_file()
