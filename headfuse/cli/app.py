"""The command `headfuse`: its commands, usage errors, and a stdout that cannot be written."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headfuse import __version__
from headfuse.cli.analyze import analyze
from headfuse.cli.doctor import doctor
from headfuse.cli.eval import evaluate
from headfuse.cli.execute import print_failure
from headfuse.cli.export import export
from headfuse.cli.fuse import fuse
from headfuse.cli.report import report
from headfuse.cli.uptrain import uptrain

_UsageError: Any = typer.BadParameter.__mro__[1]
"""click's class. Typer depended on click before 0.26 and holds a copy since, so that no one import always works."""


class Commands(TyperGroup):
    """The commands; with `--json`, a usage error is also one JSON document."""

    as_json = False
    not_utf8: str | None = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Look at the arguments before they are parsed."""
        self.as_json = "--json" in args
        self.not_utf8 = next((arg for arg in args if not _is_utf8(arg)), None)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            if self.not_utf8 is not None:
                raise _UsageError(f"{os.fsencode(self.not_utf8)!r} is not UTF-8: rename the file or folder", ctx)
            return super().invoke(ctx)
        except _UsageError as error:
            _name_the_near_one(error)
            if self.as_json:
                print_failure(error.format_message(), None, "see --help")
            raise


def _name_the_near_one(error: Any) -> None:
    """Make a usage error suggest the option or value nearest to a misspelt one."""
    error.message = error.message.replace("Input should be", "must be").replace("Value error, ", "")  # pydantic's words
    if getattr(error, "possibilities", None):
        near = difflib.get_close_matches(error.option_name, error.possibilities, 1, cutoff=0)
        error.message, error.possibilities = f"{error.message}. Did you mean {near[0]}?", None
    found = re.match(r"'(.*)' is not one of (.*)\.", error.message)
    near = difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), 1) if found else []
    if near:
        error.message += f" Did you mean {near[0]!r}?"


def _is_utf8(argument: str) -> bool:
    """Whether an argument was UTF-8: Python keeps other bytes as lone surrogates."""
    return not any("\udc80" <= character <= "\udcff" for character in argument)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fuse the key heads and the value heads of a causal language model, for a smaller KV cache.",
)
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "analyze": (analyze, "headfuse analyze model/ --budget 1/4 --output analysis/"),
    "fuse": (fuse, "headfuse fuse model/ --budget 1/4 --data corpus.jsonl"),
    "uptrain": (uptrain, "headfuse uptrain model-headfuse-1-4/ --data corpus.jsonl --tokens 50M"),
    "eval": (evaluate, "headfuse eval model-headfuse-1-4/ --baseline model/ --data test.jsonl"),
    "export": (export, "headfuse export model-gqa/ --to gguf --output model.gguf"),
    "report": (report, "headfuse report model-headfuse-1-4/ --figures eval.json"),
    "doctor": (doctor, "headfuse doctor"),
}
"""The commands in the order of work, each with the example at the end of its `--help`."""
for _name, (_command, _example) in COMMANDS.items():
    app.command(_name, epilog=f"Example: {_example}")(_command)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"headfuse {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line, and leave with its exit code."""
    code: Any = 0
    try:
        try:
            app()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
    except OSError as error:  # commands turn every other one into a message
        code = code or 1
        _forget_stdout(error)
    sys.exit(code)


def _forget_stdout(error: OSError) -> None:
    """Report that stdout cannot be written, unless its reader has gone; drop the buffered output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if error.errno != errno.EPIPE:
        with contextlib.suppress(OSError):
            typer.echo(
                f"error: standard output cannot be written: {error.strerror}\n  free space on its disk", err=True
            )
