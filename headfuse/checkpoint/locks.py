"""Locks on outputs, so that two runs never write the same one."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from headfuse.checkpoint.disk import WINDOWS, output_error
from headfuse.checkpoint.paths import file_identity
from headfuse.errors import OutputError

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of network file systems and Python builds without locks: the run continues without a lock."""


_ANOTHER = "wait for it, or choose another --output"


class OutputLock:
    """A lock on an opened file; it ends when the file is closed or the process ends.

    Args:
        stream: the opened file.
        path: where it lies; it must still lie there once it is locked.
        where: what an error names.
        fix: what it advises.

    Raises:
        OutputError: when another process has the lock.
    """

    def __init__(self, stream: IO[Any], path: Path, where: Path, fix: str = _ANOTHER) -> None:
        self._stream, self._path = stream, path
        status = os.fstat(stream.fileno())
        self._identity = status.st_dev, status.st_ino
        try:
            free = lock_descriptor(stream.fileno(), blocking=False) and self.in_place
        except OSError as error:
            free = error.errno in _NO_LOCKS
        if not free:  # locked by another process, or by one that has just finished
            raise OutputError("another process is writing here", where=where, fix=fix)

    @property
    def in_place(self) -> bool:
        """Whether the file is still at its path: not replaced, and not removed with its folder."""
        return file_identity(self._path) == self._identity

    def release_on_windows(self) -> None:
        """Close the file on Windows, which lets nobody write a locked file, or rename the folder of an open one."""
        if WINDOWS:
            self._stream.close()


@contextlib.contextmanager
def locked(folder: Path, fix: str = _ANOTHER) -> Iterator[OutputLock]:
    """Hold the lock of an output folder while the block runs.

    Raises:
        OutputError: when another process has it; it advises `fix`.
    """
    try:
        stream = (folder / LOCK).open("w")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing is in it when it is ours
        raise output_error(folder, error) from None
    with stream:
        yield OutputLock(stream, folder / LOCK, folder, fix)
