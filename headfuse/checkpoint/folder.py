"""A model folder: where it is, and what lies beside the weights."""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from headfuse.checkpoint.companions import files_of, is_companion, is_read
from headfuse.checkpoint.generation import write_generation_config
from headfuse.checkpoint.hub import parse_hub_id
from headfuse.checkpoint.inputs import local_model, read_json, refuse_adapter
from headfuse.checkpoint.reader import INDEX, SINGLE, _no_weights, _weight_map
from headfuse.errors import CheckpointError, HeadfuseError

logger = logging.getLogger(__name__)


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

    try:
        names = HfApi().list_repo_files(name, revision=revision)
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
        raise _no_weights(names, name)

    def fetch(wanted: Iterable[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]))

    folder = fetch(file for file in names if is_read(file) or file == weights)
    return fetch(set(_weight_map(folder).values())) if weights == INDEX else folder


def copy_companions(source: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Copy what belongs to the model besides its weights: tokenizer, chat templates, generation config, licence, page.

    Code of the source is copied where a tokenizer or a processor names it and the source is trusted; the folder's own
    headfuse model code, which some layouts need, comes from the installed package.
    """
    names = [name for name in files_of(source) if is_companion(name)]
    for name in names:
        (target / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(source / name, target / name)
    for name in names:
        if name.endswith("_config.json"):
            _settle_code(source, target, name, trust_remote_code)
    raw = read_json(target / "config.json", "") if (target / "config.json").exists() else {}
    if "headfuse_format" in raw:
        from headfuse.modeling import CODE

        for file in CODE[raw["model_type"]]:
            shutil.copyfile(file, target / file.name)
        write_generation_config(source, target)


def _settle_code(source: Path, target: Path, name: str, trust_remote_code: bool) -> None:
    """Copy the code that the `auto_map` of a copied file names, or take the names out of the copy.

    Names of code in other repositories, `org/name--module.Class`, stay.
    """
    raw = read_json(target / name, "restore the original file")
    auto_map = raw.get("auto_map")
    if not auto_map:
        return
    modules = _local_modules(auto_map)
    files = _code_files(source, modules)
    if files is not None and (trust_remote_code or not files):
        for file in files:
            shutil.copyfile(source / file, target / file)
        return
    reason = "--trust-remote-code was not given" if files is not None else "it is not complete"
    code = ", ".join(f"{module}.py" for module in modules)
    logger.warning("%s names code of its own (%s): left out, as %s", source / name, code, reason)
    entries = auto_map.items() if isinstance(auto_map, dict) else ()
    kept = {key: value for key, value in entries if not _local_modules(value)}
    raw = {key: value for key, value in raw.items() if key != "auto_map"} | ({"auto_map": kept} if kept else {})
    (target / name).write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _local_modules(auto_map: Any) -> list[str]:
    """Modules in the folder itself that an auto_map, or one of its values, names."""
    if isinstance(auto_map, dict):
        auto_map = list(auto_map.values())
    if isinstance(auto_map, (list, tuple)):
        return sorted({module for value in auto_map for module in _local_modules(value)})
    return [auto_map.split(".")[0]] if isinstance(auto_map, str) and "--" not in auto_map else []


def _code_files(folder: Path, modules: Iterable[str]) -> set[str] | None:
    """Names of these modules' files and of those that they import from the folder; None where one is missing."""
    from transformers.dynamic_module_utils import get_relative_import_files

    try:
        paths = {folder / f"{module}.py" for module in modules}
        paths |= {Path(path) for module in list(paths) for path in get_relative_import_files(module)}
    except (OSError, ValueError):  # no such file, or not UTF-8
        return None
    if not all(path.is_file() and path.parent == folder for path in paths):
        return None
    return {path.name for path in paths}


TRAIN_LOG = "train_log.jsonl"
