"""Output folders and files that appear whole or not at all; locks, and the state of interrupted runs."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headfuse.checkpoint.hub import in_cache
from headfuse.checkpoint.inputs import read_json
from headfuse.checkpoint.locks import FULL_DISK, LOCK, absolute, file_identity, is_at, lock, locked, output_error
from headfuse.errors import CheckpointError, OutputError

logger = logging.getLogger(__name__)
RESUME = "resume.json"
"""What the interrupted run in a folder was; its presence says that something can go on."""
STATE = "state"
_OLD = ".old-"


@contextlib.contextmanager
def output_folder(
    path: Path, *, overwrite: bool = False, resume: bool = False, reads: Iterable[Path] = ()
) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Yields `<path>.partial/`, locked against a second process. On success `state/` and `resume.json` are removed and
    the folder is renamed. After a failure it stays only where `resume.json` says that something can go on.

    Args:
        path: the final name.
        overwrite: replace what has this name, and an interrupted run.
        resume: keep what an interrupted run left.
        reads: models that the run reads, which the output may neither be, nor hold, nor lie in.

    Raises:
        OutputError: when the output exists without `overwrite`, an interrupted run is in the way, another process
            writes the same output, or the disk refuses.
    """
    path = absolute(path)
    check_output(path, overwrite=overwrite, resume=resume, reads=reads)
    partial = partial_folder(path)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from None
    with locked(partial) as lock:
        try:
            if _recover(path):
                check_output(path, overwrite=overwrite, resume=resume, reads=reads)
            if not (resume and (partial / RESUME).exists()):
                _clear(partial)
            for unfinished in partial.glob("*.new"):
                unfinished.unlink()
            yield partial
            if not is_at(lock, partial / LOCK):
                fix = "run it again, with nobody else at work here"
                raise OutputError("was removed while this run was working", where=partial, fix=fix)
            _publish(partial, path, overwrite)
        except BaseException as error:
            ours = is_at(lock, partial / LOCK)  # or of another run, after somebody removed this one's folder
            resumable = ours and (partial / RESUME).exists()
            if ours and not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise output_error(path, error, resumable) from None
            if resumable and not isinstance(error, Exception):
                error.args = (f"{partial} keeps what is done: go on with --resume",)
            raise


@contextlib.contextmanager
def output_file(path: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """A file that appears under its name only when it is complete; yields `<path>.partial`.

    Raises:
        OutputError: as `check_output_file`, and when another process writes the same file or the disk refuses.
    """
    path = absolute(path)
    check_output_file(path, overwrite=overwrite, reads=reads)
    partial = partial_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = partial.open("ab")
    except OSError as error:
        raise output_error(path, error) from None
    with stream:
        lock(stream, partial, path)
        try:
            yield partial
            sync(partial)
            check_output_file(path, overwrite=overwrite)
            partial.replace(path)
            sync(path.parent)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise output_error(path, error) from None
            raise


def check_output_file(path: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> None:
    """Raise OutputError, before any work, when `path` cannot be the output file of a new run."""
    path = absolute(path)
    for folder in reads:
        _check_apart(path, partial_folder(path), folder)
    _check_outside_cache(path)
    if path.is_dir():
        raise OutputError("is a folder, and the output is a file", where=path, fix="give the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(
            "the output already exists", where=path, fix="pass --overwrite to replace it, or another --output"
        )


_DISK_ERRORS = {*FULL_DISK, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EBUSY}


def partial_folder(path: Path) -> Path:
    """Where an output is built."""
    path = absolute(path)
    return path.with_name(path.name + ".partial")


def read_resume(partial: Path, command: str) -> dict[str, Any] | None:
    """What `write_resume` kept of the interrupted run in this folder; None where there is no such run.

    Raises:
        OutputError: when it is damaged, or of another command.
    """
    path = partial / RESUME
    if not path.exists():
        return None
    fix = "start anew with --overwrite, without --resume"
    try:
        state = read_json(path, fix)
    except CheckpointError as error:
        raise OutputError(error.what, where=path, fix=fix) from None
    if state.get("command") != command:
        raise OutputError(f"the interrupted run here is not one of `headfuse {command}`", where=partial, fix=fix)
    return state


def write_resume(partial: Path, command: str, state: Mapping[str, Any]) -> None:
    """Make the run in this folder one that `--resume` can go on with."""
    write_whole(partial / RESUME, json.dumps({"command": command, **state}, indent=1) + "\n")


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
            if not _replaceable(path):
                raise OutputError(
                    "is not a model folder, so --overwrite leaves it alone",
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


def _check_writable(path: Path, partial: Path) -> None:
    """Raise OutputError where `partial` could not be made, without making it."""
    existing = next(folder for folder in (partial, *partial.parents) if os.path.lexists(folder))
    effective = os.access in os.supports_effective_ids
    code = None
    if not existing.is_dir():
        code = errno.ENOTDIR
    elif os.statvfs(existing).f_flag & os.ST_RDONLY:
        code = errno.EROFS
    elif not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
        code = errno.EACCES
    elif len(os.fsencode(partial.name)) > os.pathconf(existing, "PC_NAME_MAX"):
        code = errno.ENAMETOOLONG
    if code is not None:
        raise output_error(path, OSError(code, os.strerror(code)))


def check_space(path: Path, nbytes: int) -> None:
    """Raise OutputError where a new output of so many bytes would not fit, as far as the file system says."""
    partial = partial_folder(path)
    if os.path.lexists(partial):  # what is there already counts
        return
    disk = shutil.disk_usage(next(folder for folder in partial.parents if folder.is_dir()))
    if disk.total and disk.free < nbytes:
        raise output_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


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


def _replaceable(path: Path) -> bool:
    """Whether --overwrite may replace this: an empty folder, or one with a config or a plan in it."""
    if not path.is_dir():
        return path.is_symlink()
    return any((path / name).exists() for name in ("config.json", "plan.json")) or not any(path.iterdir())


def _clear(partial: Path) -> None:
    """Drop what a run left that nothing can go on with; the lock stays."""
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def _publish(partial: Path, path: Path, overwrite: bool) -> None:
    """Give a finished folder its name; the one that it replaces goes last."""
    for file in partial.rglob("*"):
        sync(file)
    if os.path.lexists(path) and not (overwrite and _replaceable(path)):
        raise OutputError("the output appeared while this run was working", where=path, fix="choose another --output")
    old = None
    if os.path.lexists(path):
        old = Path(tempfile.mkdtemp(prefix=f"{path.name}{_OLD}", dir=path.parent)) / path.name
        try:
            path.rename(old)
        except BaseException:
            if not os.path.lexists(old):
                old.parent.rmdir()
            raise
    try:
        shutil.rmtree(partial / STATE, ignore_errors=True)
        (partial / RESUME).unlink(missing_ok=True)
        sync(partial)
        partial.rename(path)  # with the lock: a folder without one would be in the way of the next run
    except BaseException:
        if old is not None and not path.exists():
            old.rename(path)
            old.parent.rmdir()
        raise
    (path / LOCK).unlink(missing_ok=True)
    sync(path.parent)
    if old is not None:
        _drop(old)


def _drop(old: Path) -> None:
    """Remove an output that was replaced, and the folder that it was moved into."""
    if old.is_symlink():  # what it points to is not ours
        old.unlink(missing_ok=True)
    shutil.rmtree(old.parent, ignore_errors=True)


def _recover(path: Path) -> bool:
    """End an exchange that was cut short: the old output comes back where no new one came; whether it did."""
    back = False
    for folder in path.parent.glob(f"{glob.escape(path.name)}{_OLD}{'[a-z0-9_]' * 8}"):
        entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else None
        if entries == [path.name] and not os.path.lexists(path):
            (folder / path.name).rename(path)
            folder.rmdir()
            back = True
        elif entries in ([], [path.name]):
            _drop(folder / path.name)
    return back


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
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
