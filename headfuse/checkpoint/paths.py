"""Names and identities of outputs on the disk."""

from __future__ import annotations

import os
from pathlib import Path


def absolute(path: Path) -> Path:
    """The path without `..` and with a name, also for `.`, whose last part is empty."""
    return Path(os.path.abspath(path))


def partial_folder(path: Path) -> Path:
    """Where an output folder is built."""
    path = absolute(path)
    return path.with_name(path.name + ".partial")


def partial_file(path: Path) -> Path:
    """Where an output that is one file is built; downloads end in `.partial` alone."""
    path = absolute(path)
    return path.with_name(path.name + ".headfuse.partial")


def file_identity(path: Path) -> tuple[int, int] | None:
    """Device and inode: equal however a path is spelt."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
