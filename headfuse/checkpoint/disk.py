"""Flushing files to disk, reserving their space, and explaining disk errors.

Every step falls back where the system lacks a call: macOS has no `posix_fallocate`, Windows cannot sync a folder.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from headfuse.checkpoint.paths import absolute
from headfuse.errors import CheckpointError, HeadfuseError, OutputError

FULL_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
DISK_ERRORS = {*FULL_DISK, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EBUSY}
"""What `output_error` explains when it comes in the middle of a run."""
WINDOWS = os.name == "nt"


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows syncs only what may be written
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees all of it or what was there before, also after a power failure."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    sync(fresh)
    fresh.replace(path)


def reserve(descriptor: int, size: int) -> None:
    """Give an opened file its full size in bytes now, so that a full disk is found before the work.

    If the system cannot reserve space, only the file size is set.
    """
    allocate = getattr(os, "posix_fallocate", None)
    if allocate is None:
        os.ftruncate(descriptor, size)
        return
    try:
        allocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def output_error(path: Path, error: OSError, resumable: bool = False) -> HeadfuseError:
    """The error for an output that cannot be written; or for an input, if the failed path is not under `path`."""
    named = absolute(Path(error.filename)) if isinstance(error.filename, str) else path
    if error.errno not in FULL_DISK and not str(named).startswith(str(path)) and not path.is_relative_to(named):
        return CheckpointError(f"cannot be read: {error.strerror}", where=named, fix="check its permissions")
    fix = {
        errno.ENOSPC: "free some space or choose an --output on another disk",
        errno.EDQUOT: "free some of your quota or choose an --output on another disk",
        errno.EFBIG: "raise the limit on file size (ulimit -f) or choose another file system",
    }.get(error.errno or 0, "choose an --output that you may write to")
    return OutputError(
        f"cannot be written: {error.strerror}", where=path, fix=fix + ("; then go on with --resume" * resumable)
    )
