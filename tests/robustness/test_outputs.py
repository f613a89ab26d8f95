"""Outputs that exist, cannot be written, or would touch the source."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.robustness.refusals import SMALL, refused
from tests.support.commands import fuse, run


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_output_is_left_alone(model: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    assert "--overwrite" in run("fuse", model, "-o", out, code=1)
    assert (out if kind == "file" else out / "mine").read_text() == "mine"
    # --overwrite is for models: what is no model folder stays even then
    assert "move it away" in run("fuse", model, "-o", out, "--overwrite", code=1)
    assert (out if kind == "file" else out / "mine").read_text() == "mine"


def test_overwrite_replaces_a_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fuse(model, out, "--budget", "0.25")
    fuse(model, out, "--budget", "0.5", "--overwrite")
    assert json.loads((out / "plan.json").read_text())["budget"] == "0.5"
    assert not out.with_name("out.partial").exists()


@pytest.fixture
def untouched(model: Path) -> Iterator[None]:
    """The source is byte for byte what it was."""
    before = {path: path.read_bytes() for path in sorted(model.iterdir())}
    yield
    assert {path: path.read_bytes() for path in sorted(model.iterdir())} == before


OUTPUTS: dict[str, Callable[[Path], Path]] = {
    "the source": lambda model: model,
    "the source, spelt otherwise": lambda model: model.parent / "elsewhere/../model",
    "inside the source": lambda model: model / "inside",
    "deep inside the source": lambda model: model / "deep/inside",
    "around the source": lambda model: model.parent,
    "a link to the source": lambda model: link(model.parent / "link", model),
    "inside a link to the source": lambda model: link(model.parent / "link", model) / "inside",
    "a name whose .partial is the source": lambda model: link(model.parent / "other.partial", model).with_suffix(""),
}


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("command", ["fuse", "uptrain", "analyze"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("name", OUTPUTS)
def test_the_source_is_never_the_output(model: Path, name: str, options: tuple[str, ...], command: str) -> None:
    out = OUTPUTS[name](model)
    more = ("--loss", "ce", "--tokens", 64) if command == "uptrain" else ()
    data = ("--data", model.parent / "text.txt", "--sequence-length", 32)
    message = run(command, model, "-o", out, *options, *data, *more, code=1)
    assert "a source is never touched" in message


@pytest.mark.usefixtures("untouched")
def test_a_source_with_the_name_of_the_partial_folder(model: Path, tmp_path: Path) -> None:
    source = model.rename(tmp_path / "other.partial")
    for options in ([], ["--overwrite"], ["--resume"]):
        message = run("fuse", source, "-o", tmp_path / "other", *options, code=1)
        assert "a source is never touched" in message
    source.rename(model)


def test_the_working_folder_as_output(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.` has no name; with --overwrite it must not take away whatever lies there."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/mine").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    assert "the name is empty" in run("fuse", model, "-o", "", "--overwrite", code=2)
    for out in (".", "./"):
        assert "already exists" in run("fuse", model, "-o", out, code=1)
        assert "move it away" in run("fuse", model, "-o", out, "--overwrite", code=1)
    assert (tmp_path / "work/mine").read_text() == "mine"


def test_outputs_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = ("--data", tmp_path / "text.txt", *SMALL)
    assert "cannot be written" in refused(tmp_path / "file/out", model, *data)
    assert "cannot be written" in refused(Path("/proc/nowhere/out"), model, *data)
    assert "File name too long" in run("fuse", model, "-o", tmp_path / ("x" * 300), *data, code=1)


@pytest.fixture
def guarded() -> Iterator[Path]:
    """A folder that this user may search but not write to; root becomes nobody for the time."""
    folder = Path(tempfile.mkdtemp(prefix="headfuse-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("closed", ["output", "model", "config.json", "model.safetensors", "text.txt", "plan.json"])
def test_missing_permissions(pristine: Path, guarded: Path, closed: str) -> None:
    model, text = shutil.copytree(pristine, guarded / "model"), guarded / "text.txt"
    shutil.copy(pristine.parent / "text.txt", text)
    data = ("--data", text, *SMALL)
    (guarded / "plan.json").write_text("{}")
    for file in model.iterdir():
        file.chmod(0o644)
    (guarded / "open").mkdir()
    (guarded / "open").chmod(0o777)
    places = {"model": model, "text.txt": text, "plan.json": guarded / "plan.json", "output": guarded}
    place, out = places.get(closed, model / closed), guarded / "open/out"
    if closed == "output":
        out = guarded / "out"
    else:
        place.chmod(0o000)
    with unprivileged(guarded):
        message = refused(out, model, *data, *(("--plan", place) if closed == "plan.json" else ()))
    assert "ermission" in message
    assert message.startswith("/out: " if closed == "output" else str(place))
    place.chmod(0o755)
