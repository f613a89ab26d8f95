"""A command that must fail: its message, and that it leaves nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

from typer.testing import CliRunner

from headfuse.cli.app import app


def refused(out: Path, *args: object, code: int = 1, command: str = "fuse") -> str:
    """The message of a command that must fail: where, what and what to do; nothing at or beside the output name.

    `--json` puts the same into exactly one document on stdout.
    """
    result = CliRunner().invoke(app, [command, *map(str, args), "-o", str(out), "--json"])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert "unexpected" not in result.output, "a failure that no check foresaw"
    assert not os.path.lexists(out)
    assert not out.with_name(out.name + ".partial").exists()
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["output"] is None
    error = document["error"]
    assert error["what"]
    assert error["fix"]
    if code == 1:
        assert error["where"]
        assert result.stderr == f"error: {error['where']}: {error['what']}\n  {error['fix']}\n"
    message = f"{error['where']}: {error['what']}\n  {error['fix']}"
    return message.replace(str(out.parent), "")  # the folder has the name of the test in it


SMALL = ("--samples", 4, "--sequence-length", 32, "--budget", 1)
