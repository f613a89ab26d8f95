"""Writes the files beside the weights of an output: config, tokenizer, licence, options, model card, plan."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headfuse.checkpoint.companions import FUSE_OPTIONS, files_of, is_companion
from headfuse.checkpoint.generation import write_generation_config
from headfuse.checkpoint.inputs import read_json
from headfuse.checkpoint.plan_file import write_plan
from headfuse.plan import FusionPlan

logger = logging.getLogger(__name__)
_RESTORE = "restore the original file"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def finish_folder(
    partial: Path,
    source: Path,
    *,
    config: Mapping[str, Any],
    card: str,
    options: Mapping[str, str],
    plan: FusionPlan | None,
    checksums: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Complete an output folder that holds its weights.

    Args:
        partial: the folder in the making.
        source: the model folder that it was made from.
        config: its config.json.
        card: its README.md.
        options: name and text of the YAML files that reproduce it; `headfuse.yaml` is the source's by default.
        plan: for plan.json, which also gets the checksum of every file.
        checksums: SHA-256 by the names of files whose checksums are known already.
        trust_remote_code: keep code of the source that its tokenizer names.

    Raises:
        CheckpointError: for files of the source that cannot be read, and generation parameters that are not valid.
    """
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_companions(source, partial, trust_remote_code)
    for file in code_files(config):
        shutil.copyfile(file, partial / file.name)
    if code_files(config):
        write_generation_config(source, partial)
    if config["model_type"] != read_json(source / "config.json", "this is not a model folder").get("model_type"):
        _name_tokenizer_class(source, partial)
    if (source / FUSE_OPTIONS).exists():
        shutil.copyfile(source / FUSE_OPTIONS, partial / FUSE_OPTIONS)
    for name, text in {**options, "README.md": card}.items():
        (partial / name).write_text(text, encoding="utf-8")
    if plan is not None:
        write_plan(partial, plan, checksums)


def code_files(config: Mapping[str, Any]) -> tuple[Path, ...]:
    """The installed files that belong beside the weights of a model with this config.json; none for stock classes."""
    from headfuse.modeling import CODE

    return CODE.get(str(config.get("model_type")), ()) if "headfuse_format" in config else ()


def companions(folder: Path) -> list[str]:
    """The files that an output keeps of its source."""
    return [name for name in files_of(folder) if is_companion(name)]


def check_companions(folder: Path) -> None:
    """Raise CheckpointError for a file of settings that could not be copied in the end."""
    for name in companions(folder):
        if name.endswith("_config.json"):
            read_json(folder / name, _RESTORE)


def copy_companions(source: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Copy what belongs to the model besides its weights: tokenizer, chat templates, generation config, licence, page.

    The source's code is copied if a tokenizer or processor names it and the source is trusted.
    """
    names = companions(source)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(source / name, target / name)
    for name in names:
        if name.endswith("_config.json"):
            _settle_code(source, target, name, trust_remote_code)


def _name_tokenizer_class(source: Path, target: Path) -> None:
    """Name the tokenizer's class in a folder of another model type, because transformers may pick it by model type.

    A source without tokenizer_config.json gets one, with the special tokens that its class has. Whether BOS is added
    stays with tokenizer.json: what the class says of it need not be what happens.
    """
    from transformers import AutoTokenizer

    path = target / "tokenizer_config.json"
    fields = read_json(path, _RESTORE) if path.exists() else None
    if fields is not None and "auto_map" in fields:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # of many kinds; it loads from the source no better than from the copy
        return
    if fields is None:
        if not any((source / file).exists() for file in tokenizer.vocab_files_names.values()):
            return  # some classes load from nothing
        fields = {name: getattr(tokenizer, name) for name in _SPECIAL_TOKENS}
    fields["tokenizer_class"] = type(tokenizer).__name__
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _settle_code(source: Path, target: Path, name: str, trust_remote_code: bool) -> None:
    """Copy the code that the `auto_map` of a copied file names, or remove the names from the copy.

    Names of code in other repositories, `org/name--module.Class`, stay.
    """
    raw = read_json(target / name, _RESTORE)
    auto_map = raw.get("auto_map")
    if not auto_map:
        return
    modules = _local_modules(auto_map)
    files = _code_files(source, modules)
    if files is not None and (trust_remote_code or not files):
        for file in files:
            shutil.copyfile(source / file, target / file)
        return
    reason = "--trust-remote-code was not given" if files is not None else "the code is not complete"
    code = ", ".join(f"{module}.py" for module in modules)
    logger.warning("%s names custom code (%s), which was left out: %s", source / name, code, reason)
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
