"""Which files of a model folder hold its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from headfuse.checkpoint.inputs import read_json
from headfuse.checkpoint.quantised import refuse_gguf
from headfuse.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files, the single one before an index, as transformers chooses."""
    try:
        if (folder / SINGLE).is_file():
            return [SINGLE]
        if (folder / INDEX).exists():
            files = sorted(set(weight_map(folder).values()))
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise CheckpointError(
                    "this shard is missing", where=folder / missing[0], fix="copy or download it again"
                )
            return files
        refuse_gguf(folder)
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder, fix="check its permissions") from None
    raise no_weights(names, folder)


def no_weights(names: Iterable[str], where: object) -> CheckpointError:
    """The error for a model folder or repository without safetensors."""
    pickles = [name for name in names if "/" not in name and Path(name).suffix in {".bin", ".pt", ".pth", ".ckpt"}]
    pickles.sort(key=lambda name: (not name.startswith("pytorch_model"), name))  # a training leaves others as well
    if pickles:
        return CheckpointError(
            f"the weights are pickled ({pickles[0]}), and unpickling runs code",
            where=where,
            fix="convert them once, where you trust them: load with transformers, then save_pretrained(folder)",
        )
    return CheckpointError(f"no weights: neither {SINGLE} nor {INDEX}", where=where, fix="copy or download the weights")


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name by the index, whose files are plain names in this folder; empty without an index."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).exists():
        return {}
    found = read_json(folder / INDEX, "restore the original file").get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError("has no weight_map", where=folder / INDEX, fix="restore the original file")
    for file in found.values():
        if Path(file).name != file or not file.endswith(".safetensors") or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"names {file!r}, which is not a safetensors file of this folder",
                where=folder / INDEX,
                fix="shard names must be plain file names; do not use an index from a source that you do not trust",
            )
    return found
