"""Names and places of the Hugging Face hub: repositories, revisions, and the folders of its cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from headfuse.errors import ConfigError

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at one commit."""

    name: str
    revision: str


def parse_hub_id(model: str) -> tuple[str, str | None] | None:
    """Name and revision of `org/name` or `org/name@revision`; None if it is no hub id."""
    match = _HUB_ID.fullmatch(model)
    return None if match is None else (match[1], match[2])


def at_revision(model: str, revision: str | None) -> str:
    """The MODEL argument for a hub id at a revision.

    Raises:
        ConfigError: for a local folder, and for a hub id that has a revision already.
    """
    if revision is None:
        return model
    if Path(model).exists():
        raise ConfigError("a local folder has no revisions", where="--revision", fix="leave it out, or give a hub id")
    if "@" in model:
        raise ConfigError(f"{model} has a revision already", where="--revision", fix="give the revision once")
    return f"{model}@{revision}"


def repository_of(folder: Path) -> Repository | None:
    """The repository of a snapshot in the hub's cache, `models--org--name/snapshots/<commit>`; None elsewhere."""
    folder = folder.resolve()
    storage = folder.parent.parent
    if folder.parent.name != "snapshots" or not storage.name.startswith("models--"):
        return None
    return Repository(storage.name.removeprefix("models--").replace("--", "/"), folder.name)


def in_cache(path: Path) -> bool:
    """Whether a path is in the hub's cache, whose tools delete unknown files."""
    return any(
        folder.name.startswith("models--") and (folder / "snapshots").is_dir() for folder in path.resolve().parents
    )


def folder_name(folder: Path) -> str:
    """The name of a model for an output: its repository if the folder is in the hub's cache, else the folder's name."""
    repository = repository_of(folder)
    return folder.resolve().name if repository is None else repository.name


def default_parent(folder: Path) -> Path:
    """Default folder for outputs: beside the model, or the working directory if the model is in the hub's cache."""
    return Path.cwd() if in_cache(folder) else folder.resolve().parent
