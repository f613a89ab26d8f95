"""The record of an interrupted run in its folder, for `--resume`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headfuse.checkpoint.disk import write_whole
from headfuse.checkpoint.inputs import read_json
from headfuse.errors import CheckpointError, OutputError

RESUME = "resume.json"
"""The file that names the interrupted run in a folder; its presence says that something can go on."""
STATE = "state"
"""The folder of what a run needs to go on."""


def read_resume(partial: Path, command: str) -> dict[str, Any] | None:
    """The record that `write_resume` made of the interrupted run in this folder; None if there is none.

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
