"""Output folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from headfuse.checkpoint.disk import DISK_ERRORS, output_error, sync
from headfuse.checkpoint.interrupted import RESUME, STATE
from headfuse.checkpoint.locks import LOCK, OutputLock, locked
from headfuse.checkpoint.output_checks import check_output, check_output_file, replaceable
from headfuse.checkpoint.paths import absolute, partial_file, partial_folder
from headfuse.errors import OutputError

_OLD, _MARK = ".old-", ".headfuse"
"""Of the folder that takes what gives way to a finished output: behind the output's name, and a file in it."""


@contextlib.contextmanager
def output_folder(
    path: Path, *, overwrite: bool = False, resume: bool = False, reads: Iterable[Path] = ()
) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Yields `<path>.partial/`, locked against a second process. On success the folder is renamed, without `state/` and
    `resume.json`. After a failure it stays only where `resume.json` says that something can go on.

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
            if not lock.in_place:
                fix = "run it again, with no other process working here"
                raise OutputError("was removed while this run was working", where=partial, fix=fix)
            lock.release_on_windows()
            _publish(partial, path, overwrite)
        except BaseException as error:
            ours = lock.in_place  # or of another run, after somebody removed this one's folder
            resumable = ours and (partial / RESUME).exists()
            if ours and not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise output_error(path, error, resumable) from None
            if resumable and not isinstance(error, Exception):
                error.args = (f"{partial} keeps what is done: go on with --resume",)
            raise


@contextlib.contextmanager
def output_file(path: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """A file that appears under its name only when it is complete; yields one with another name beside it.

    Raises:
        OutputError: as `check_output_file`, and when another process writes the same file or the disk refuses.
    """
    path = absolute(path)
    check_output_file(path, overwrite=overwrite, reads=reads)
    partial = partial_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = partial.open("ab")
    except OSError as error:
        raise output_error(path, error) from None
    with stream:
        OutputLock(stream, partial, path).release_on_windows()
        try:
            yield partial
            sync(partial)
            check_output_file(path, overwrite=overwrite)
            partial.replace(path)
            sync(path.parent)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise output_error(path, error) from None
            raise


def _clear(partial: Path) -> None:
    """Remove leftovers of a run that cannot be resumed; the lock stays."""
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def _publish(partial: Path, path: Path, overwrite: bool) -> None:
    """Give a finished folder its name; what it replaces, and what it could go on from, is removed last."""
    for file in partial.rglob("*"):
        sync(file)
    if os.path.lexists(path) and not (overwrite and replaceable(path)):
        raise OutputError("the output appeared while this run was working", where=path, fix="choose another --output")
    aside = Path(tempfile.mkdtemp(prefix=f"{path.name}{_OLD}", dir=path.parent))
    moves = _aside(aside, partial, path)
    try:
        (aside / _MARK).touch()
        for origin, target in moves:
            if os.path.lexists(origin):
                origin.rename(target)
        sync(partial)
        partial.rename(path)  # with the lock: a folder without one would be in the way of the next run
    except BaseException:
        if not os.path.lexists(partial):
            path.rename(partial)
        _put_back(moves)
        with contextlib.suppress(OSError):  # not empty: what could not go back stays there
            (aside / _MARK).unlink(missing_ok=True)
            aside.rmdir()
        raise
    (path / LOCK).unlink(missing_ok=True)
    sync(path.parent)
    _drop(aside, path)


def _aside(aside: Path, partial: Path, path: Path) -> list[tuple[Path, Path]]:
    """What gives way to a finished folder, and where it goes."""
    return [(partial / RESUME, aside / f".{RESUME}"), (partial / STATE, aside / f".{STATE}"), (path, aside / path.name)]


def _put_back(moves: list[tuple[Path, Path]]) -> None:
    """Undo these moves, as far as they were made."""
    for origin, target in reversed(moves):
        if os.path.lexists(target) and not os.path.lexists(origin):
            target.rename(origin)


def _drop(aside: Path, path: Path) -> None:
    """Remove the folder of what gave way."""
    if (aside / path.name).is_symlink():  # what it points to is not ours
        (aside / path.name).unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)


def _recover(path: Path) -> bool:
    """Finish an interrupted exchange: undo it if the new output is missing; return whether the old one came back."""
    back = False
    for aside in path.parent.glob(f"{glob.escape(path.name)}{_OLD}{'[a-z0-9_]' * 8}"):
        if (aside / _MARK).exists():  # folders of others may have such names
            if not os.path.lexists(path):
                _put_back(_aside(aside, partial_folder(path), path))
                back = os.path.lexists(path)
            _drop(aside, path)
        elif aside.is_dir() and not any(aside.iterdir()):
            aside.rmdir()
    return back
