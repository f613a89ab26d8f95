"""A full disk at any moment: one message, and no output."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headfuse.cli.app import app
from tests.robustness.refusals import SMALL, refused
from tests.support.commands import run


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond it, as on a disk that is full: writing fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.long
def test_full_disk_in_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "headfuse", "fuse", model, "-o", tmp_path / "out", "--json"]
    done = subprocess.run(
        [*map(str, line), "--data", str(tmp_path / "text.txt"), *map(str, SMALL)],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "cannot be written" in json.loads(done.stdout)["error"]["what"]
    assert not list(tmp_path.glob("out*"))


def test_full_disk_before_the_weights(model: Path, tmp_path: Path) -> None:
    with file_size_limit(50_000):
        assert "ulimit" in refused(tmp_path / "out", model, "--data", tmp_path / "text.txt", *SMALL)


def test_full_disk_while_companions_are_copied(model: Path, tmp_path: Path) -> None:
    """The weights fit, a file beside them does not; what is done can go on when there is space."""
    size = (model / "model.safetensors").stat().st_size + 4096
    (model / "LICENSE").write_text("licence\n" * size)
    data = ("--data", tmp_path / "text.txt", *SMALL)
    with file_size_limit(size):
        message = run("fuse", model, "-o", tmp_path / "out", *data, code=1)
    assert "cannot be written" in message
    assert "--resume" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
    run("fuse", model, "-o", tmp_path / "out", *data, "--resume")
    assert (tmp_path / "out/LICENSE").read_bytes() == (model / "LICENSE").read_bytes()


def test_full_disk_while_analyze_writes(model: Path, tmp_path: Path) -> None:
    with file_size_limit(1000):
        message = refused(tmp_path / "out", model, "--data", tmp_path / "text.txt", *SMALL, command="analyze")
    assert "cannot be written" in message


PAGE = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many pages; a second call changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(pages: int) -> Path:
        nonlocal mounted
        option = f"{'remount,' * mounted}size={pages * PAGE}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_at_every_size(model: Path, tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    """From too small for the weights up to one page short: whichever file is the one that fails, nothing is half done.

    Where the weights were laid out, `--resume` completes the run once there is space.
    """
    data = ("--data", tmp_path / "text.txt", *SMALL)
    run("fuse", model, "-o", tmp_path / "whole", *data)
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    weights = -(-len(files["model.safetensors"]) // PAGE)
    outcomes = set()
    for pages in range(weights - 1, weights + 100):
        disk = small_disk(pages)
        result = CliRunner().invoke(app, ["fuse", str(model), "-o", str(disk / "out"), *map(str, data)])
        if result.exit_code == 0:
            break
        assert result.exit_code == 1, result.output
        assert "No space left" in result.output
        assert "free some space" in result.output
        assert "Traceback" not in result.output
        assert not (disk / "out").exists()
        resumable = (disk / "out.partial/resume.json").exists()
        assert resumable == ("--resume" in result.output)
        assert resumable == (disk / "out.partial").exists()
        present = {file.name for file in (disk / "out.partial").iterdir()} if resumable else set()
        outcome = frozenset(present & files.keys())
        if resumable and outcome not in outcomes:
            small_disk(weights + 100)
            run("fuse", model, "-o", disk / "out", *data, "--resume")
            assert {file.name: file.read_bytes() for file in (disk / "out").iterdir()} == files
            shutil.rmtree(disk / "out")
        shutil.rmtree(disk / "out.partial", ignore_errors=True)
        outcomes.add(outcome)
    else:
        pytest.fail("never large enough")
    for name in ("config.json", "tokenizer.json"):
        assert any(name in present for present in outcomes), "no failure was after this file was begun"
    assert frozenset() in outcomes, "no failure was before the weights"
    assert len(outcomes) >= 4
