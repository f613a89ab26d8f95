"""Where a model folder is: on the disk, or downloaded from the hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from headfuse.checkpoint.companions import is_read
from headfuse.checkpoint.hub import parse_hub_id
from headfuse.checkpoint.inputs import local_model, refuse_adapter
from headfuse.checkpoint.weight_files import INDEX, SINGLE, no_weights, weight_map
from headfuse.errors import CheckpointError, HeadfuseError

HUB_SECONDS = 10.0
"""How long an answer of the hub is waited for before what lies in its cache is taken."""


def resolve_model(name: str, revision: str | None = None) -> Path:
    """The local folder of a model: `name` itself, or the download of a hub id, `org/name` or `org/name@revision`.

    Raises:
        CheckpointError: when there is no such folder and no such repository can be reached, and for an adapter.
    """
    folder = local_model(name)
    if folder is not None:
        return folder
    hub_id = parse_hub_id(name)
    assert hub_id is not None  # local_model has refused it
    try:
        return _download(hub_id[0], revision or hub_id[1])
    except HeadfuseError:
        raise
    except Exception as error:  # the hub, the network and the cache raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"neither a local folder nor a repository that the hub gives ({reason})",
            where=name,
            fix="check the path or the id; private repositories need HF_TOKEN; HF_HUB_OFFLINE=1 forbids downloads",
        ) from None


def _download(name: str, revision: str | None) -> Path:
    """The snapshot of a repository with what a run reads, in the hub's cache; the cached one if the hub is away."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    try:  # one request: a listing is tried again for half a minute where there is no network
        found = HfApi().model_info(name, revision=revision or "main", timeout=HUB_SECONDS)
        names = [file.rfilename for file in found.siblings or ()]
    except RevisionNotFoundError:
        raise
    except Exception as unreachable:
        try:
            cached = snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json"])
        except LocalEntryNotFoundError:
            raise unreachable from None
        refuse_adapter(os.listdir(cached), name)
        return Path(cached)
    refuse_adapter(names, name)
    weights = next((file for file in (SINGLE, INDEX) if file in names), None)
    if weights is None and "config.json" in names:
        raise no_weights(names, name)

    def fetch(wanted: Iterable[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]))

    folder = fetch(file for file in names if is_read(file) or file == weights)
    return fetch(set(weight_map(folder).values())) if weights == INDEX else folder
