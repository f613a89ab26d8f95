"""Whether a place can take an output: the checks before any work."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from headfuse.checkpoint.companions import COMPANION_FOLDERS
from headfuse.checkpoint.disk import output_error
from headfuse.checkpoint.hub import in_cache
from headfuse.checkpoint.inputs import read_json
from headfuse.checkpoint.interrupted import RESUME, STATE
from headfuse.checkpoint.locks import LOCK, locked
from headfuse.checkpoint.paths import absolute, file_identity, partial_file, partial_folder
from headfuse.errors import CheckpointError, OutputError


def check_output(path: Path, *, overwrite: bool = False, resume: bool = False, reads: Iterable[Path] = ()) -> None:
    """Raise OutputError, before any work, when `path` cannot be the output of a new run."""
    path, partial = absolute(path), partial_folder(path)
    try:
        for folder in reads:
            _check_apart(path, partial, folder)
        _check_outside_cache(path)
        if os.path.lexists(path):
            if not overwrite:
                raise OutputError(
                    "the output already exists", where=path, fix="pass --overwrite to replace it, or another --output"
                )
            if not replaceable(path):
                raise OutputError(
                    "is no model folder, or holds other folders, so --overwrite leaves it alone",
                    where=path,
                    fix="move it away yourself, or choose another --output",
                )
        if not os.path.lexists(partial):
            _check_writable(path, partial)
            return
        resumable = (partial / RESUME).exists()
        ours = resumable or (partial / LOCK).exists() or (partial.is_dir() and not any(partial.iterdir()))
        if not ours:
            raise OutputError(
                "is in the way: the output is built under this name",
                where=partial,
                fix="move it away, or choose another --output",
            )
        if resumable and not (resume or overwrite):
            with locked(partial):  # another process that is at work deserves another answer
                pass
            raise OutputError(
                "an interrupted run is here",
                where=partial,
                fix="pass --resume to go on, or --overwrite to start anew",
            )
        _check_writable(path, partial)
    except OSError as error:
        raise output_error(path, error) from None


def check_output_file(path: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> None:
    """Raise OutputError, before any work, when `path` cannot be the output file of a new run."""
    path = absolute(path)
    for folder in reads:
        _check_apart(path, partial_file(path), folder)
    _check_outside_cache(path)
    if path.is_dir():
        raise OutputError("is a folder, and the output is a file", where=path, fix="give the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(
            "the output already exists", where=path, fix="pass --overwrite to replace it, or another --output"
        )


def check_space(path: Path, nbytes: int) -> None:
    """Raise OutputError if a new output of this many bytes would not fit, according to the file system."""
    partial = partial_folder(path)
    if os.path.lexists(partial):  # what is there already counts
        return
    disk = shutil.disk_usage(next(folder for folder in partial.parents if folder.is_dir()))
    if disk.total and disk.free < nbytes:
        raise output_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def replaceable(path: Path) -> bool:
    """Whether --overwrite may replace this: a link, an empty folder, or one that holds a model or plan, and no others.

    A folder inside it that no model has, such as `.git` or the checkpoints of a training, is somebody's work.
    """
    if not path.is_dir():
        return path.is_symlink()
    entries = list(path.iterdir())
    known = {*COMPANION_FOLDERS, STATE, "__pycache__"}
    if any(entry.is_dir() and not entry.is_symlink() and entry.name.lower() not in known for entry in entries):
        return False
    return (
        not entries
        or "model_type" in _fields(path / "config.json")
        or "headfuse_version" in _fields(path / "plan.json")
    )


def _fields(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "")
    except CheckpointError:
        return {}


def _check_writable(path: Path, partial: Path) -> None:
    """Raise OutputError where `partial` could not be made, without making it."""
    existing = next(folder for folder in (partial, *partial.parents) if os.path.lexists(folder))
    effective = os.access in os.supports_effective_ids
    code = None
    if not existing.is_dir():
        code = errno.ENOTDIR
    elif hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY:
        code = errno.EROFS
    elif not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
        code = errno.EACCES
    elif hasattr(os, "pathconf") and len(os.fsencode(partial.name)) > os.pathconf(existing, "PC_NAME_MAX"):
        code = errno.ENAMETOOLONG
    if code is not None:
        raise output_error(path, OSError(code, os.strerror(code)))


def _check_apart(path: Path, partial: Path, source: Path) -> None:
    fix = "choose another --output: a source is never touched"
    ours, theirs = file_identity(source), _lineage(source)
    for target in (path, partial):
        if ours is not None and file_identity(target) == ours:
            raise OutputError("is a model that this run reads", where=target, fix=fix)
        if ours is not None and ours in _lineage(target):
            raise OutputError("lies inside a model that this run reads", where=target, fix=fix)
        if file_identity(target) in theirs:
            raise OutputError("holds a model that this run reads", where=target, fix=fix)


def _check_outside_cache(path: Path) -> None:
    if in_cache(path):
        raise OutputError(
            "lies in the hub's cache, where `hf cache prune` would delete it", where=path, fix="choose another --output"
        )


def _lineage(path: Path) -> set[tuple[int, int]]:
    real = path.resolve()
    return {identity for folder in (real, *real.parents) if (identity := file_identity(folder)) is not None}
