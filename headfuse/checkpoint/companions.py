"""Which files of a model folder belong to the model besides weights: one list, for copying and for downloading."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

_IMAGES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp")
COMPANIONS = (
    # transformers
    "generation_config*.json", "*processor_config.json", "configuration.json",
    "chat_template*", "*.jinja", "*.jinja2",
    # tokenizers: settings, vocabularies, merges
    "tokenizer*.json", "*tokens*.json", "*vocab*.json", "tekken.json", "encoder.json", "unigram.json", "emoji.json",
    "normalizer.json", "*.model", "*.model.v[0-9]*", "*.tiktoken", "*.spm", "*.vocab", "*.bpe", "*.codes", "*.txt",
    # the hub's page
    "*.md", "*.pdf", *_IMAGES, "*licen[cs]e*", "notice*", "use_policy*", "copying*", "copyright*", "citation*",
    "authors*", "patents*",
)  # fmt: skip
"""Patterns of names, in lower case, at the top of a model folder."""
COMPANION_FOLDERS: dict[str, tuple[str, ...]] = {
    "additional_chat_templates": ("*.jinja",),
    **dict.fromkeys(
        ("license", "licenses", "licences", "legal"), ("*.md", "*.txt", "*.pdf", "*licen[cs]e*", "notice*")
    ),
    **dict.fromkeys(
        ("assets", "figs", "figures", "figure", "image", "images", "img", "imgs", "media", "pics", "resources"), _IMAGES
    ),
}
"""Patterns of the paths in a folder of that name."""
FUSE_OPTIONS = "headfuse.yaml"
TRAIN_LOG = "train_log.jsonl"
OWN = ("plan.json", FUSE_OPTIONS, "uptrain.yaml", TRAIN_LOG)
"""Files that headfuse writes beside the weights, anew for every output."""


def is_companion(name: str) -> bool:
    """Whether an output keeps a file of its source, by the path in the folder; weights, code and pickles never.

    Files that describe other weights are not kept: adapters, quantised or sharded copies, training states.
    """
    lower = name.lower()
    top, _, inner = lower.partition("/")
    if lower == "readme.md" or top.startswith("."):
        return False
    patterns = COMPANION_FOLDERS.get(top, ()) if inner else COMPANIONS
    return any(fnmatchcase(inner or top, pattern) for pattern in patterns)


def is_read(name: str) -> bool:
    """Whether a run reads this file of a repository: companions, config, card, code and headfuse's files, not
    weights.
    """
    code = name.endswith(".py") and "/" not in name
    return is_companion(name) or code or name in ("config.json", "README.md", *OWN)


def adapter_files(names: Iterable[str]) -> list[str]:
    """The files of an adapter (LoRA and its kind) at the top of a model folder."""
    patterns = ("adapter_config.json", "adapter_model.*", "adapters.safetensors")
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def files_of(folder: Path) -> list[str]:
    """Paths of the files at the top of a folder and in the folders that may hold companions."""
    inside = (path for path in folder.iterdir() if path.name.lower() in COMPANION_FOLDERS and path.is_dir())
    paths = [*folder.iterdir(), *(path for place in inside for path in place.rglob("*"))]
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
