"""Quick checks of a command's inputs, made before torch is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

from headfuse.checkpoint.companions import adapter_files
from headfuse.checkpoint.hub import parse_hub_id
from headfuse.checkpoint.quantised import refuse_gguf
from headfuse.errors import CheckpointError, ConfigError, OutputError

_POINTER = b"version https://git-lfs.github.com/spec/"


def local_model(name: str) -> Path | None:
    """The folder of a model; None for a hub id.

    Raises:
        CheckpointError: when the name is neither, and for an adapter.
    """
    if not name:  # Path("") would be the working directory: an unset variable of a script
        raise CheckpointError("the model's name is empty", where="MODEL", fix="give a model folder or a hub id")
    folder = Path(name)
    try:
        if folder.is_dir():
            refuse_adapter([path.name for path in folder.iterdir()], name)
            return folder
        if folder.exists():
            raise CheckpointError("is a file", where=name, fix="give the model's folder, with config.json in it")
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise CheckpointError(f"cannot be read: {error.strerror}", where=name, fix="check the path") from None
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"cannot be read: {error}", where=repr(name), fix="check the path") from None
    if parse_hub_id(name) is None:
        raise CheckpointError(
            "no such folder", where=name, fix="give a model folder or a hub id like org/name or org/name@revision"
        )
    return None


def refuse_adapter(names: Iterable[str], where: object) -> None:
    """Raise CheckpointError for a folder with an adapter, which would change what the weights compute."""
    adapter = adapter_files(names)
    if adapter:
        raise CheckpointError(
            f"holds an adapter ({', '.join(adapter)}), but headfuse reads only complete weights",
            where=where,
            fix="merge it into its base model with peft: PeftModel.from_pretrained(base, ADAPTER_FOLDER)"
            ".merge_and_unload().save_pretrained(MERGED), copy the tokenizer's files, and give MERGED; to leave it "
            "out, give a folder without its files",
        )


def check_model(*names: str | None) -> None:
    """Raise CheckpointError unless each name, if there is one, is a hub id or a folder with a readable config.json."""
    for name in names:
        folder = None if name is None else local_model(name)
        if folder is not None:
            if not os.path.exists(folder / "config.json"):
                refuse_gguf(folder)
            read_json(
                folder / "config.json",
                "this is not a model folder; give the one that holds config.json and the weights",
            )


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: when there is none; `fix` is for a file that is missing.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path, fix=fix) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path, fix="check its permissions") from None
    except (ValueError, RecursionError) as error:
        if is_pointer(path):
            fix = "fetch the model with git lfs pull"
            raise CheckpointError("is a Git LFS pointer, not the file itself", where=path, fix=fix) from None
        # not UTF-8, not JSON, or a number of 5000 digits
        raise CheckpointError(f"is not valid JSON: {error}", where=path, fix="restore the original file") from None
    if not isinstance(value, dict):
        raise CheckpointError("must hold a JSON object", where=path, fix="restore the original file")
    return value


def begins_as_pointer(stream: BufferedReader) -> bool:
    """Whether a file is only a Git LFS pointer, as after a clone without LFS; the read position does not move."""
    return stream.peek(len(_POINTER)).startswith(_POINTER)


def is_pointer(path: Path) -> bool:
    """Whether the file at this path is a Git LFS pointer."""
    with path.open("rb") as stream:
        return begins_as_pointer(stream)


def check_exists(path: Path | None, fix: str, *, folder: bool = False) -> None:
    """Raise ConfigError if a file or folder is given and does not exist."""
    if path is None:
        return
    try:
        found = path.is_dir() if folder else path.exists()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path, fix="check the path") from None
    if not found:
        raise ConfigError("no such folder" if folder else "no such file", where=path, fix=fix)


def check_writable(*paths: Path | None) -> None:
    """Raise OutputError, before any work, for a file that cannot be written."""
    for path in filter(None, paths):
        parent = path.absolute().parent
        if path.is_dir():
            raise OutputError("is a folder", where=path, fix="give the name of a file")
        if not parent.is_dir():
            raise OutputError("its folder does not exist", where=path, fix=f"create {parent}, or choose another name")
        if not os.access(path if path.exists() else parent, os.W_OK):
            raise OutputError("may not be written", where=path, fix="check the permissions of it and its folder")
