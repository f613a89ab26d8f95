"""The model code beside the weights of `decoupled` and `layerwise` folders: compare it with the installed one, renew
it.

headfuse loads such folders by its own code; everybody else runs the code in the folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Literal

from headfuse.checkpoint.checksums import file_sha256
from headfuse.checkpoint.finish import code_files
from headfuse.checkpoint.interrupted import RESUME
from headfuse.checkpoint.output import output_folder
from headfuse.checkpoint.paths import partial_folder
from headfuse.checkpoint.plan_file import verify
from headfuse.errors import CheckpointError, ConfigError, OutputError
from headfuse.models.config import read_config

logger = logging.getLogger(__name__)
State = Literal["current", "older", "newer", "other"]
"""Model code in a folder, against the installed one; `other`: as old, but not the same."""
_VERSION = re.compile(r"^CODE_VERSION = (\d{1,9})\b", re.MULTILINE)


def installed_files(folder: Path) -> tuple[Path, ...]:
    """The installed files that belong beside the weights of a folder; none where its class is a stock one."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # which whoever loads the folder explains
        return ()
    return code_files(raw) if isinstance(raw, dict) else ()


def code_state(folder: Path) -> State | None:
    """How the model code in a folder compares with the installed one; None for stock classes and without any code."""
    pairs = [(folder / file.name, file) for file in installed_files(folder)]
    if not any(own.exists() for own, _ in pairs):
        return None
    if all(own.is_file() and own.read_bytes() == file.read_bytes() for own, file in pairs):
        return "current"
    theirs, ours = (_version(files) for files in zip(*pairs, strict=True))
    return "older" if theirs < ours else "newer" if theirs > ours else "other"


def _version(files: tuple[Path, ...]) -> int:
    """CODE_VERSION of model code; the first version did not name its number."""
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    return max((int(number) for text in texts for number in _VERSION.findall(text)), default=1)


def describe(state: State, folder: Path | str) -> str:
    """Describe a code state in words, with what to do."""
    renew = f"headfuse export {folder} --refresh"
    return {
        "current": "its model code is that of the installed headfuse",
        "older": f"its model code is older than the installed headfuse's; renew it: {renew}",
        "other": f"its model code differs from the installed headfuse's; renew it: {renew}",
        "newer": "its model code is newer than the installed headfuse's; update headfuse",
    }[state]


def warn_of_other_code(folder: Path) -> None:
    """Warn once that other programs will run different model code for this folder than headfuse does."""
    state = code_state(folder)
    if state not in (None, "current"):
        _warn_once(f"{folder}: {describe(state, folder)}")


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def refresh(model: str) -> tuple[Path, list[str]]:
    """Put the installed model code into a folder, and its checksums into plan.json; all other files stay as they are.

    The folder is replaced as a whole, by one whose other files are hard links to the same data.

    Returns:
        The folder, and the names of the files that changed: none where the code is current.

    Raises:
        ConfigError: for a folder of a stock class, which has no model code.
        CheckpointError: for what is no local folder, for newer code, and where plan.json finds that another file has
            changed.
        OutputError: where the folder cannot be replaced.
    """
    folder = Path(os.path.realpath(model))
    if not model or not os.path.isdir(folder):
        raise CheckpointError("no such folder", where=model or "MODEL", fix="give a local folder that headfuse wrote")
    read_config(folder)
    files = installed_files(folder)
    if not files:
        raise ConfigError("has no model code: its class is a stock one", where=folder, fix="use it as it is")
    if code_state(folder) == "newer":
        raise CheckpointError("its model code is newer than the installed headfuse's", where=folder,
                              fix="update headfuse")  # fmt: skip
    names = {file.name for file in files}
    has_plan = (folder / "plan.json").exists()  # or transformers saved the folder
    plan = verify(folder, apart_from=names) if has_plan else None
    new = {file.name: file_sha256(file) for file in files}
    old = {name: file_sha256(folder / name) for name in names if (folder / name).is_file()}
    if old == new and (plan is None or new.items() <= plan.files.items()):
        return folder, []
    if (partial_folder(folder) / RESUME).exists():
        raise OutputError("an interrupted run is here", where=partial_folder(folder),
                          fix="end it with --resume, or remove it")  # fmt: skip
    replaced = {*names, "plan.json"} if plan is not None else names
    with output_folder(folder, overwrite=True) as partial:
        shutil.copytree(
            folder, partial, symlinks=True, dirs_exist_ok=True, copy_function=_link,
            ignore=lambda parent, _: replaced if Path(parent) == folder else (),
        )  # fmt: skip
        for file in files:
            shutil.copyfile(file, partial / file.name)
        if plan is not None:
            renewed = plan.model_copy(update={"files": dict(sorted({**plan.files, **new}.items()))}).sealed()
            (partial / "plan.json").write_text(renewed.to_json(), encoding="utf-8")
    return folder, sorted(name for name in names if old.get(name) != new[name])


def _link(source: str, target: str) -> str:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
