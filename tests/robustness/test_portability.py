"""A system without calls that only some have: macOS reserves no space, Windows has no fcntl and syncs no folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headfuse.checkpoint import disk
from headfuse.checkpoint.output import output_file, output_folder
from headfuse.checkpoint.plan_file import verify
from headfuse.checkpoint.writer import mapped_tensor
from tests.support.tiny_models import tiny_model

ELSEWHERE = """
import ctypes, os, shutil, sys
sys.modules["fcntl"] = None
usage = shutil.disk_usage(".")
shutil.disk_usage = lambda path: usage
for name in ("posix_fallocate", "statvfs", "pathconf", "ST_RDONLY"):
    delattr(os, name)
native = ctypes.CDLL
def no_process_handle(name, *args, **options):
    if name is None:
        raise TypeError("as on Windows")
    return native(name, *args, **options)
ctypes.CDLL = no_process_handle
from headfuse.cli.app import app
app(sys.argv[1:])
"""


@pytest.mark.long
def test_a_model_is_fused_without_them(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    text = ["--data", str(tmp_path / "text.txt"), "--samples", "4", "--sequence-length", "32", "--preset", "fast"]
    line = ["fuse", str(model), "-o", str(tmp_path / "out"), "--budget", "0.5", "--threads", "1", *text]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verify(tmp_path / "out")
    assert [entry.name for entry in tmp_path.glob("out*")] == ["out"]


def test_a_file_gets_its_size_where_no_space_can_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert mapped_tensor(tmp_path / "state", (3, 4)).shape == (3, 4)
    assert (tmp_path / "state").stat().st_size == 48


def test_outputs_appear_where_folders_cannot_be_opened_or_renamed_while_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where the lock is released before the folder gets its name."""
    opened = os.open

    def files_alone(path: str, flags: int, *args: int, **options: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(disk, "WINDOWS", True)
    monkeypatch.setattr("headfuse.checkpoint.locks.WINDOWS", True)
    monkeypatch.setattr(disk.os, "open", files_alone)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # no removing through opened folders either
    with output_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
    with output_file(tmp_path / "model.gguf") as partial:
        partial.write_bytes(b"weights")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.gguf", "out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["config.json"]
