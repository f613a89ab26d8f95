"""Locks on outputs, so that two runs never write the same one, and what a disk that refuses means."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from headfuse.errors import CheckpointError, HeadfuseError, OutputError

LOCK = ".lock"
FULL_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What flock says on network file systems that do not have it."""


def absolute(path: Path) -> Path:
    """The path without `..` and with a name, also for `.`, whose last part is empty."""
    return Path(os.path.abspath(path))


def file_identity(path: Path) -> tuple[int, int] | None:
    """Device and inode: equal however a path is spelt."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[Any]]:
    """Hold the lock of an output folder while the block runs."""
    try:
        stream = (folder / LOCK).open("w")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing is in it when it is ours
        raise output_error(folder, error) from None
    with stream:
        lock(stream, folder / LOCK, folder)
        yield stream


def is_at(stream: IO[Any], path: Path) -> bool:
    """Whether an opened file is the one that a path leads to."""
    status = os.fstat(stream.fileno())
    return file_identity(path) == (status.st_dev, status.st_ino)


def lock(stream: IO[Any], path: Path, where: Path) -> None:
    """Lock an opened file, which has to be the one at `path` still."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stale = not is_at(stream, path)
    except OSError as error:
        stale = error.errno not in _NO_LOCKS
    if stale:  # locked by another process, or by one that has just finished
        raise OutputError("another process is writing here", where=where, fix="wait for it, or choose another --output")


def output_error(path: Path, error: OSError, resumable: bool = False) -> HeadfuseError:
    """The error of an output that the disk refuses; of an input, where the path is not under `path`."""
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
