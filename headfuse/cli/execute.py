"""Runs a command: result on stdout, log on stderr, and one message and an exit code for every failure."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typer
from rich.console import Console

from headfuse.cli.say import say
from headfuse.errors import HeadfuseError
from headfuse.models.heap import use_huge_pages

Document = dict[str, Any]
"""What `--json` prints."""
_Result = TypeVar("_Result")


def execute(
    work: Callable[[], Document],
    render: Callable[[Document, Console], None],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    files: Callable[[Document], None] | None = None,
) -> None:
    """Run a command, print its result, and turn every failure into one message and an exit code.

    `files` writes what goes beside the printed result, and comes after it: one that fails takes no figures with it.
    """
    first = is_first_process()
    with _log(verbose and first):
        document = _done(work, as_json and first, verbose)
    if not first:
        return
    try:
        _show(document, render, as_json, quiet)
    finally:
        if files is not None:
            _done(lambda: files(document), as_json=False, verbose=verbose)
    failed = [gate["gate"] for gate in document.get("gates", []) if not gate["passed"]]
    if failed:
        typer.echo(f"error: gates failed: {', '.join(failed)}", err=True)
        raise typer.Exit(3)


def _show(document: Document, render: Callable[[Document, Console], None], as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(json.dumps(document))
    elif quiet:
        if document.get("output"):
            typer.echo(document["output"])
    else:
        render(document, Console(markup=False, emoji=False))  # names may hold brackets and colons


def is_first_process() -> bool:
    """Whether this process prints: the first one of `accelerate launch`, or a single process."""
    return os.environ.get("RANK", "0") == "0"


def log_console(silent: bool) -> Console:
    """Where the stages of a command are shown."""
    return Console(stderr=True, quiet=silent, markup=False, emoji=False)


def calm_libraries(verbose: bool) -> None:
    """Silence log messages and progress bars of libraries, unless asked for; imports the heavy libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    use_huge_pages()
    if verbose:
        return
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def _log(shown: bool) -> Iterator[None]:
    """Show what the package logs on stderr, below warnings, too; these are always shown."""
    if not shown:
        yield
        return
    log, handler = logging.getLogger("headfuse"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def print_failure(what: str, where: str | None, fix: str | None) -> None:
    """Print a failure as a JSON document."""
    error = {"what": what, "where": where, "fix": fix}
    with contextlib.suppress(
        OSError
    ):  # a full disk behind stdout: the message on stderr tells the failure that matters
        typer.echo(json.dumps({"schema_version": 1, "output": None, "error": error}))


class _Terminated(BaseException):
    """SIGTERM, so that cleaning up runs as it does for Ctrl-C."""


def _terminated(number: int, frame: object) -> None:
    raise _Terminated


def _done(work: Callable[[], _Result], as_json: bool, verbose: bool) -> _Result:
    """The result of the work; a failure is printed and becomes an exit code."""
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        return work()
    except (KeyboardInterrupt, _Terminated) as error:
        what, code = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else ("terminated", 143)
        fix = str(error) or "nothing was written; run it again"
        typer.echo(f"{what}\n  {fix}", err=True)
        if as_json:
            print_failure(what, None, fix)
        raise typer.Exit(code) from None
    except Exception as error:
        expected = error if isinstance(error, HeadfuseError) else _explained(error)
        unforeseen = verbose and error is not expected
        if not unforeseen:
            for line in f"error: {expected}".splitlines():
                say(log_console(silent=False), line)
        if as_json:
            print_failure(expected.what, expected.where, expected.fix)
        if unforeseen:
            raise
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _explained(error: Exception) -> HeadfuseError:
    """Turn an unforeseen error into a HeadfuseError."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return HeadfuseError(error.strerror, where=error.filename, fix="check the path, its permissions and the disk")
    if isinstance(error, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:
        return HeadfuseError(
            f"out of memory: {reason}", fix="give fewer --samples or a smaller --sequence-length, or another --device"
        )
    return HeadfuseError(
        f"unexpected {type(error).__name__}: {reason}",
        fix="this is a fault of headfuse: run again with --verbose and report the traceback",
    )
