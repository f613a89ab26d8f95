"""The command as the tests call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from headfuse.cli.app import app


def run(*args: object, code: int = 0) -> str:
    """The output of the command, checked for its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


LAYOUT = {"--layout", "--for", "--plan", "--config", "--cross-layer"}
"""Options that may decide the layout."""


def fuse(model: Path, out: Path, *args: object) -> dict[str, Any]:
    """`headfuse fuse` on the tiny text; the document of `--json`. Layout decoupled where no argument may decide it."""
    text, layout = model.parent / "text.txt", () if LAYOUT.intersection(args) else ("--layout", "decoupled")
    options = ("--data", text, "--samples", 8, "--sequence-length", 32, "--json", *layout, *args)
    document: dict[str, Any] = json.loads(run("fuse", model, "-o", out, *options).splitlines()[-1])
    return document
