"""Checkpoint folders: the only module that opens or writes weight files.

Reading goes tensor by tensor. Writing fills files of a known layout tensor by tensor, in a folder that gets its final
name only when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from headfuse.architectures import ARCHITECTURES
from headfuse.companions import adapter_files, files_of, is_companion, is_read
from headfuse.errors import CheckpointError, HeadfuseError, OutputError, UnsupportedModelError
from headfuse.generation import write_generation_config
from headfuse.hub import in_cache, parse_hub_id
from headfuse.inputs import local_model, read_json
from headfuse.plan import FusionPlan
from headfuse.quantised import refuse_gguf, refuse_quantised, refuse_quantised_config

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest shard, as in transformers' save_pretrained."""

MAX_LAYERS = 10_000
"""transformers' configs make lists of so many entries, so a damaged number could fill the memory."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------- reading


def resolve_model(name: str, revision: str | None = None) -> Path:
    """The local folder of a model: `name` itself, or the download of a hub id, `org/name` or `org/name@revision`.

    Raises:
        CheckpointError: when there is no such folder and no such repository can be reached, and for an adapter.
    """
    folder = local_model(name)
    if folder is not None:
        try:
            _refuse_adapter([path.name for path in folder.iterdir()], name)
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror}", where=name, fix="check its permissions"
            ) from None
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
        _refuse_adapter(os.listdir(cached), name)
        return Path(cached)
    _refuse_adapter(names, name)
    weights = next((file for file in (SINGLE, INDEX) if file in names), None)
    if weights is None and "config.json" in names:
        raise _no_weights(names, name)

    def fetch(wanted: Iterable[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]))

    folder = fetch(file for file in names if is_read(file) or file == weights)
    return fetch(set(_weight_map(folder).values())) if weights == INDEX else folder


def _refuse_adapter(names: Iterable[str], where: object) -> None:
    """Raise CheckpointError for a folder with an adapter in it, which changes what the weights beside it compute."""
    adapter = adapter_files(names)
    if adapter:
        raise CheckpointError(
            f"holds an adapter ({', '.join(adapter)}), and headfuse reads whole weights alone",
            where=where,
            fix="merge it into its base model with peft: PeftModel.from_pretrained(base, ADAPTER_FOLDER)"
            ".merge_and_unload().save_pretrained(MERGED), copy the tokenizer's files, and give MERGED; to leave it "
            "out, give a folder without its files",
        )


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model config of `folder`.

    Raises:
        CheckpointError: when config.json is missing, is not JSON, or holds values that the family refuses.
        UnsupportedModelError: when transformers does not know the model type.
    """
    path = folder / "config.json"
    if not os.path.exists(path):  # false, too, where the folder is closed
        refuse_gguf(folder)
    raw = read_json(path, "this is not a model folder; give the one that holds config.json and the weights")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("has no model_type", where=path, fix="use the config.json that came with the model")
    refuse_quantised_config(raw, path)
    _check_class(raw, path)
    named = raw.get("transformers_weights")
    if named not in (None, SINGLE, INDEX):
        raise UnsupportedModelError(
            f"transformers_weights names {named!r}, and headfuse reads {SINGLE} or {INDEX}", where=path,
            fix=f"load the model with transformers and save_pretrained it, which writes {SINGLE}",
        )  # fmt: skip
    fused = "headfuse_format" in raw
    if "auto_map" in raw and not fused and not trust_remote_code and not _is_known(model_type):
        raise UnsupportedModelError(
            f"model_type {model_type!r} needs its own code", where=path, fix="pass --trust-remote-code if you trust it"
        )
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise CheckpointError(
            f"num_hidden_layers is {layers}", where=path, fix="use the config.json that came with the model"
        )
    if fused:
        import headfuse.modeling  # noqa: F401  registers the layouts that have code of their own
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=needs_code(model_type, trust_remote_code))
    except Exception as error:  # the strict configs of transformers raise many kinds
        if not _is_known(model_type):
            raise UnsupportedModelError(
                f"model_type {model_type!r} is not known to the installed transformers",
                where=path,
                fix=f"supported: {', '.join(sorted(ARCHITECTURES))}",
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(reason, where=path, fix="use the config.json that came with the model") from None


def _check_class(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse a model with another head than that of a language model; a base model has none, and may do without."""
    names = raw.get("architectures")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and re.search(r"For(?!CausalLM)[A-Z]\w*$|RewardModel$", name):
            raise UnsupportedModelError(
                f"{name} is not a causal language model: it has another head",
                where=path,
                fix="give a causal language model, such as the one that this model was trained from",
            )


def raw_config(folder: Path) -> dict[str, Any]:
    """config.json for an output: without the source's path, and without names of files that the output does not hold.

    What headfuse writes is loaded by transformers' own classes, or by code that comes with headfuse.
    """
    raw = read_json(folder / "config.json", "this is not a model folder")
    for part in (raw, raw.get("source_config")):
        if isinstance(part, dict):
            for field in ("_name_or_path", "transformers_weights"):
                part.pop(field, None)
            if "headfuse_format" not in part:
                part.pop("auto_map", None)
    return raw


def needs_code(model_type: str, trust_remote_code: bool) -> bool:
    """Whether a model runs by code of its own: where that is trusted and transformers has no class for the type.

    The fused model has transformers' class, so the source is measured by the same.
    """
    return trust_remote_code and not _is_known(model_type)


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


class Checkpoint:
    """The safetensors weights of a folder, read tensor by tensor.

    Args:
        folder: a local model folder.

    Raises:
        CheckpointError: for missing, pickled, truncated, empty or corrupt files, missing shards, and an index that
            names a file outside the folder or does not agree with the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self._place: dict[str, tuple[str, int]] = {}
        self._digests: dict[str, bytes] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        headers = {file: _read_header(folder / file) for file in self.files}
        tensors = [tensor for _, header in headers.values() for tensor in header.items()]
        refuse_quantised(folder, {name: entry["dtype"] for name, entry in tensors})
        for file, (start, header) in headers.items():
            for name, entry in header.items():
                if name in self._place:
                    raise CheckpointError(
                        f"tensor {name} is in {self._place[name][0]} as well",
                        where=folder / file,
                        fix="the shards are of two checkpoints: copy or download the model again",
                    )
                if entry["dtype"] not in DTYPES:
                    raise UnsupportedModelError(
                        f"tensor {name} has dtype {entry['dtype']}",
                        where=folder / file,
                        fix="convert a full-precision checkpoint",
                    )
                self._place[name] = (file, start + entry["data_offsets"][0])
                self._shapes[name], self._dtypes[name] = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        if not self._place:
            raise CheckpointError("holds no tensors", where=folder / self.files[0], fix="restore the original file")
        for name, file in _weight_map(folder).items():
            if name not in self._place or self._place[name][0] != file:
                raise CheckpointError(
                    f"puts tensor {name} into {file}, which does not hold it",
                    where=folder / INDEX,
                    fix="index and shards do not belong together: copy or download both again",
                )
        self.show({name: name for name in self._place})

    @property
    def nbytes(self) -> int:
        """Size of all weight files in bytes."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, checked to be finite.

        Read, not mapped: a mapped file counts as memory, and one that is cut off meanwhile ends the process.
        """
        data = self._bytes(self.stored_names[name])
        tensor = data.view(self.dtypes[name]).reshape(self.shapes[name])
        if not is_finite(tensor):
            raise CheckpointError(
                f"tensor {name} holds NaN or infinity",
                where=self.folder / self._place[self.stored_names[name]][0],
                fix="the weights are damaged: take a checkpoint from before they diverged",
            )
        return tensor

    def _bytes(self, name: str) -> torch.Tensor:
        file, offset = self._place[name]
        data = torch.empty(_nbytes(self._dtypes[name], self._shapes[name]), dtype=torch.uint8)
        try:
            with (self.folder / file).open("rb") as stream:
                stream.seek(offset)
                complete = stream.readinto(data.numpy().data) == len(data)
        except OSError as error:
            raise CheckpointError(
                f"tensor {name} cannot be read: {error.strerror}",
                where=self.folder / file,
                fix="the file must stay readable while headfuse runs",
            ) from None
        if not complete:
            raise CheckpointError(
                f"ends before tensor {name} does", where=self.folder / file, fix="copy or download the file again"
            )
        if name not in self._digests:
            self._digests[name] = hashlib.sha256(data.numpy().data).digest()
        return data

    def show(self, names: Mapping[str, str]) -> None:
        """Show some tensors, under other names: `names[stored]`. The fingerprint goes by all, as they are stored."""
        self.stored_names = {shown: stored for stored, shown in names.items()}
        self.shapes = {shown: self._shapes[stored] for stored, shown in names.items()}
        self.dtypes = {shown: self._dtypes[stored] for stored, shown in names.items()}

    def fingerprint(self) -> str:
        """SHA-256 over config.json and every tensor by name: the same however the tensors are spread over files.

        What was read before is not read again.
        """
        digest = hashlib.sha256(file_sha256(self.folder / "config.json").encode())
        for name in sorted(self._place):
            if name not in self._digests:
                self._bytes(name)
            digest.update(f"{name} {DTYPE_CODES[self._dtypes[name]]} {list(self._shapes[name])} ".encode())
            digest.update(self._digests[name])
        return digest.hexdigest()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and the entry of each by name, as the library checked them."""
    damaged = "it is damaged or cut off: copy or download it again"
    try:
        with path.open("rb") as stream:  # safetensors calls every file that it cannot open missing
            with safe_open(path, framework="pt") as handle:
                names = set(handle.keys())
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot be read: {reason}", where=path, fix="check its permissions") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"is not a complete safetensors file ({error})", where=path, fix=damaged) from None
    header.pop("__metadata__", None)
    if header.keys() != names:  # the library read other names than a JSON parser does
        raise CheckpointError("is not a complete safetensors file (names)", where=path, fix=damaged)
    return 8 + length, header


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files, the single one before an index, as transformers chooses."""
    try:
        if (folder / SINGLE).is_file():
            return [SINGLE]
        if (folder / INDEX).exists():
            files = sorted(set(_weight_map(folder).values()))
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
    raise _no_weights(names, folder)


def _no_weights(names: Iterable[str], where: object) -> CheckpointError:
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


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name by the index, whose files are plain names in this folder; empty without an index."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).exists():
        return {}
    weight_map = read_json(folder / INDEX, "restore the original file").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError("has no weight_map", where=folder / INDEX, fix="restore the original file")
    for file in weight_map.values():
        if Path(file).name != file or not file.endswith(".safetensors") or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"names {file!r}, which is not a safetensors file of this folder",
                where=folder / INDEX,
                fix="shard names must be plain file names; do not use an index from a source that you do not trust",
            )
    return weight_map


def fingerprint(folder: Path) -> str:
    """What plan.json knows the source in a folder by (reads every weight)."""
    return Checkpoint(folder).fingerprint()


def file_sha256(path: Path) -> str:
    """SHA-256 of one file."""
    try:
        with path.open("rb") as stream:
            return (
                hashlib.file_digest(stream, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _digest(stream)
            )
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path, fix="check its permissions") from None


def _digest(stream: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- writing


class SafetensorsWriter:
    """Writes safetensors files whose tensors are known by name, dtype and shape before the first one is computed.

    The files get their full size at once, so a full disk shows before the work; tensors may come in any order; what is
    already written can be read back. A file that is written from its beginning to its end is hashed on the way.

    Args:
        folder: where the files go.
        tensors: name -> (dtype, shape), in file order.
        resume: continue files that an interrupted run left.

    Raises:
        OutputError: when those files are not the ones that this run writes.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], resume: bool = False
    ) -> None:
        self.folder = folder
        self._place: dict[str, tuple[str, int]] = {}
        self.dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
        self.shapes = {name: shape for name, (_, shape) in tensors.items()}
        self._spec = dict(tensors)
        self._hashed: dict[str, tuple[Any, int]] = {}
        shards: list[list[str]] = [[]]
        size = 0
        for name, spec in tensors.items():
            if shards[-1] and size + _nbytes(*spec) > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += _nbytes(*spec)
        count = len(shards)
        self.files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for file, names in zip(self.files, shards, strict=True):
            self._lay_out(file, names, resume)
        if count > 1:
            weight_map = {name: self._place[name][0] for name in tensors}
            total = sum(_nbytes(*spec) for spec in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: str, names: list[str], resume: bool) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in sorted(names, key=lambda name: -self._spec[name][0].itemsize):  # so that each is aligned
            dtype, shape = self._spec[name]
            end = offset + _nbytes(dtype, shape)
            header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for name in names:
            self._place[name] = (file, start + header[name]["data_offsets"][0])
        path = self.folder / file
        if resume:  # a new file would hold zeros where the interrupted run says that layers are done
            if path.exists() and path.stat().st_size == start + offset:
                with path.open("rb") as stream:
                    if stream.read(start) == len(text).to_bytes(8, "little") + text:
                        return
            raise OutputError(
                "is not what the interrupted run wrote", where=path, fix="start anew with --overwrite, without --resume"
            )
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.flush()
            _reserve(stream.fileno(), start + offset)
        self._hashed[file] = hashlib.sha256(len(text).to_bytes(8, "little") + text), start

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor at its place, in the dtype that the file was laid out with."""
        dtype, shape = self._spec[name]
        if tuple(tensor.shape) != tuple(shape):
            raise AssertionError(f"{name}: laid out as {shape}, computed as {tuple(tensor.shape)}")
        file, offset = self._place[name]
        converted = tensor.detach().to("cpu", dtype)
        if not is_finite(converted):
            raise HeadfuseError(
                f"tensor {name} is beyond the range of {str(dtype).removeprefix('torch.')}",
                where="--dtype",
                fix="write bfloat16 or float32",
            )
        data = converted.contiguous().flatten().view(torch.uint8).numpy().data
        with (self.folder / file).open("r+b", buffering=0) as stream:
            stream.seek(offset)
            written = 0
            while written < len(data):  # a disk that fills up takes a part, then none
                written += stream.write(data[written:]) or 0
        digest, hashed = self._hashed.get(file, (None, -1))
        if hashed == offset:
            digest.update(data)
            self._hashed[file] = digest, offset + len(data)
        elif offset < hashed:  # written once more
            del self._hashed[file]

    def sync(self) -> None:
        """Bring what is written to the disk, so that a record of it never outlives it."""
        for file in self.files:
            sync(self.folder / file)

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the files that were written in one go; the others must be read for it."""
        whole = {file: (self.folder / file).stat().st_size for file in self._hashed}
        return {file: digest.hexdigest() for file, (digest, end) in self._hashed.items() if end == whole[file]}

    def read(self, name: str) -> torch.Tensor:
        """Read back a tensor that was written before."""
        dtype, shape = self._spec[name]
        file, offset = self._place[name]
        with (self.folder / file).open("rb") as stream:
            stream.seek(offset)
            data = bytearray(stream.read(_nbytes(dtype, shape)))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite; the extremes are, where one is, and come 40 times faster than isfinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


def mapped_tensor(path: Path, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that lies in a file: what is written to it is in the file, a new file holds zeros."""
    with path.open("ab") as stream:
        _reserve(stream.fileno(), _nbytes(dtype, tuple(shape)))
    size = math.prod(shape)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(tuple(shape))


def _reserve(descriptor: int, size: int) -> None:
    """Give the file its full size now, so that a full disk is found before the work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


RESUME = "resume.json"
"""What the interrupted run in a folder was; its presence says that something can go on."""
STATE = "state"
_LOCK = ".lock"
_OLD = ".old-"


@contextlib.contextmanager
def output_folder(
    path: Path, *, overwrite: bool = False, resume: bool = False, reads: Iterable[Path] = ()
) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Yields `<path>.partial/`, locked against a second process. On success `state/` and `resume.json` are removed and
    the folder is renamed. After a failure it stays only where `resume.json` says that something can go on.

    Args:
        path: the final name.
        overwrite: replace what has this name, and an interrupted run.
        resume: keep what an interrupted run left.
        reads: models that the run reads, which the output may neither be, nor hold, nor lie in.

    Raises:
        OutputError: when the output exists without `overwrite`, an interrupted run is in the way, another process
            writes the same output, or the disk refuses.
    """
    path = _absolute(path)
    check_output(path, overwrite=overwrite, resume=resume, reads=reads)
    partial = partial_folder(path)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _output_error(path, error) from None
    with _locked(partial) as lock:
        try:
            if _recover(path):
                check_output(path, overwrite=overwrite, resume=resume, reads=reads)
            if not (resume and (partial / RESUME).exists()):
                _clear(partial)
            for unfinished in partial.glob("*.new"):
                unfinished.unlink()
            yield partial
            if not _is_at(lock, partial / _LOCK):
                fix = "run it again, with nobody else at work here"
                raise OutputError("was removed while this run was working", where=partial, fix=fix)
            _publish(partial, path, overwrite)
        except BaseException as error:
            ours = _is_at(lock, partial / _LOCK)  # or of another run, after somebody removed this one's folder
            resumable = ours and (partial / RESUME).exists()
            if ours and not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise _output_error(path, error, resumable) from None
            if resumable and not isinstance(error, Exception):
                error.args = (f"{partial} keeps what is done: go on with --resume",)
            raise


@contextlib.contextmanager
def output_file(path: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """A file that appears under its name only when it is complete; yields `<path>.partial`.

    Raises:
        OutputError: as `check_output_file`, and when another process writes the same file or the disk refuses.
    """
    path = _absolute(path)
    check_output_file(path, overwrite=overwrite, reads=reads)
    partial = partial_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = partial.open("ab")
    except OSError as error:
        raise _output_error(path, error) from None
    with stream:
        _lock(stream, partial, path)
        try:
            yield partial
            sync(partial)
            check_output_file(path, overwrite=overwrite)
            partial.replace(path)
            sync(path.parent)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise _output_error(path, error) from None
            raise


def check_output_file(path: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> None:
    """Raise OutputError, before any work, when `path` cannot be the output file of a new run."""
    path = _absolute(path)
    for folder in reads:
        _check_apart(path, partial_folder(path), folder)
    _check_outside_cache(path)
    if path.is_dir():
        raise OutputError("is a folder, and the output is a file", where=path, fix="give the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(
            "the output already exists", where=path, fix="pass --overwrite to replace it, or another --output"
        )


_FULL_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_DISK_ERRORS = {*_FULL_DISK, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EBUSY}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What flock says on network file systems that do not have it."""


def partial_folder(path: Path) -> Path:
    """Where an output is built."""
    path = _absolute(path)
    return path.with_name(path.name + ".partial")


def read_resume(partial: Path, command: str) -> dict[str, Any] | None:
    """What `write_resume` kept of the interrupted run in this folder; None where there is no such run.

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


def _absolute(path: Path) -> Path:
    """The path without `..` and with a name, also for `.`, whose last part is empty."""
    return Path(os.path.abspath(path))


def check_output(path: Path, *, overwrite: bool = False, resume: bool = False, reads: Iterable[Path] = ()) -> None:
    """Raise OutputError, before any work, when `path` cannot be the output of a new run."""
    path, partial = _absolute(path), partial_folder(path)
    try:
        for folder in reads:
            _check_apart(path, partial, folder)
        _check_outside_cache(path)
        if os.path.lexists(path):
            if not overwrite:
                raise OutputError(
                    "the output already exists", where=path, fix="pass --overwrite to replace it, or another --output"
                )
            if not _replaceable(path):
                raise OutputError(
                    "is not a model folder, so --overwrite leaves it alone",
                    where=path,
                    fix="move it away yourself, or choose another --output",
                )
        if not os.path.lexists(partial):
            _check_writable(path, partial)
            return
        resumable = (partial / RESUME).exists()
        ours = resumable or (partial / _LOCK).exists() or (partial.is_dir() and not any(partial.iterdir()))
        if not ours:
            raise OutputError(
                "is in the way: the output is built under this name",
                where=partial,
                fix="move it away, or choose another --output",
            )
        if resumable and not (resume or overwrite):
            with _locked(partial):  # another process that is at work deserves another answer
                pass
            raise OutputError(
                "an interrupted run is here",
                where=partial,
                fix="pass --resume to go on, or --overwrite to start anew",
            )
        _check_writable(path, partial)
    except OSError as error:
        raise _output_error(path, error) from None


def _check_writable(path: Path, partial: Path) -> None:
    """Raise OutputError where `partial` could not be made, without making it."""
    existing = next(folder for folder in (partial, *partial.parents) if os.path.lexists(folder))
    effective = os.access in os.supports_effective_ids
    code = None
    if not existing.is_dir():
        code = errno.ENOTDIR
    elif os.statvfs(existing).f_flag & os.ST_RDONLY:
        code = errno.EROFS
    elif not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
        code = errno.EACCES
    elif len(os.fsencode(partial.name)) > os.pathconf(existing, "PC_NAME_MAX"):
        code = errno.ENAMETOOLONG
    if code is not None:
        raise _output_error(path, OSError(code, os.strerror(code)))


def check_space(path: Path, nbytes: int) -> None:
    """Raise OutputError where a new output of so many bytes would not fit, as far as the file system says."""
    partial = partial_folder(path)
    if os.path.lexists(partial):  # what is there already counts
        return
    disk = shutil.disk_usage(next(folder for folder in partial.parents if folder.is_dir()))
    if disk.total and disk.free < nbytes:
        raise _output_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _check_apart(path: Path, partial: Path, source: Path) -> None:
    fix = "choose another --output: a source is never touched"
    ours, theirs = _identity(source), _lineage(source)
    for target in (path, partial):
        if ours is not None and _identity(target) == ours:
            raise OutputError("is a model that this run reads", where=target, fix=fix)
        if ours is not None and ours in _lineage(target):
            raise OutputError("lies inside a model that this run reads", where=target, fix=fix)
        if _identity(target) in theirs:
            raise OutputError("holds a model that this run reads", where=target, fix=fix)


def _check_outside_cache(path: Path) -> None:
    if in_cache(path):
        raise OutputError(
            "lies in the hub's cache, where `hf cache prune` would delete it", where=path, fix="choose another --output"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode: equal however a path is spelt."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _lineage(path: Path) -> set[tuple[int, int]]:
    real = path.resolve()
    return {identity for folder in (real, *real.parents) if (identity := _identity(folder)) is not None}


def _replaceable(path: Path) -> bool:
    """Whether --overwrite may replace this: an empty folder, or one with a config or a plan in it."""
    if not path.is_dir():
        return path.is_symlink()
    return any((path / name).exists() for name in ("config.json", "plan.json")) or not any(path.iterdir())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[Any]]:
    try:
        stream = (folder / _LOCK).open("w")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing is in it when it is ours
        raise _output_error(folder, error) from None
    with stream:
        _lock(stream, folder / _LOCK, folder)
        yield stream


def _is_at(stream: IO[Any], path: Path) -> bool:
    """Whether an opened file is the one that a path leads to."""
    status = os.fstat(stream.fileno())
    return _identity(path) == (status.st_dev, status.st_ino)


def _lock(stream: IO[Any], path: Path, where: Path) -> None:
    """Lock an opened file, which has to be the one at `path` still."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stale = not _is_at(stream, path)
    except OSError as error:
        stale = error.errno not in _NO_LOCKS
    if stale:  # locked by another process, or by one that has just finished
        raise OutputError("another process is writing here", where=where, fix="wait for it, or choose another --output")


def _clear(partial: Path) -> None:
    """Drop what a run left that nothing can go on with; the lock stays."""
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()


def _publish(partial: Path, path: Path, overwrite: bool) -> None:
    """Give a finished folder its name; the one that it replaces goes last."""
    for file in partial.rglob("*"):
        sync(file)
    if os.path.lexists(path) and not (overwrite and _replaceable(path)):
        raise OutputError("the output appeared while this run was working", where=path, fix="choose another --output")
    old = None
    if os.path.lexists(path):
        old = Path(tempfile.mkdtemp(prefix=f"{path.name}{_OLD}", dir=path.parent)) / path.name
        try:
            path.rename(old)
        except BaseException:
            if not os.path.lexists(old):
                old.parent.rmdir()
            raise
    try:
        shutil.rmtree(partial / STATE, ignore_errors=True)
        (partial / RESUME).unlink(missing_ok=True)
        sync(partial)
        partial.rename(path)  # with the lock: a folder without one would be in the way of the next run
    except BaseException:
        if old is not None and not path.exists():
            old.rename(path)
            old.parent.rmdir()
        raise
    (path / _LOCK).unlink(missing_ok=True)
    sync(path.parent)
    if old is not None:
        _drop(old)


def _drop(old: Path) -> None:
    """Remove an output that was replaced, and the folder that it was moved into."""
    if old.is_symlink():  # what it points to is not ours
        old.unlink(missing_ok=True)
    shutil.rmtree(old.parent, ignore_errors=True)


def _recover(path: Path) -> bool:
    """End an exchange that was cut short: the old output comes back where no new one came; whether it did."""
    back = False
    for folder in path.parent.glob(f"{glob.escape(path.name)}{_OLD}{'[a-z0-9_]' * 8}"):
        entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else None
        if entries == [path.name] and not os.path.lexists(path):
            (folder / path.name).rename(path)
            folder.rmdir()
            back = True
        elif entries in ([], [path.name]):
            _drop(folder / path.name)
    return back


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _output_error(path: Path, error: OSError, resumable: bool = False) -> HeadfuseError:
    named = _absolute(Path(error.filename)) if isinstance(error.filename, str) else path
    if error.errno not in _FULL_DISK and not str(named).startswith(str(path)) and not path.is_relative_to(named):
        return CheckpointError(f"cannot be read: {error.strerror}", where=named, fix="check its permissions")
    fix = {
        errno.ENOSPC: "free some space or choose an --output on another disk",
        errno.EDQUOT: "free some of your quota or choose an --output on another disk",
        errno.EFBIG: "raise the limit on file size (ulimit -f) or choose another file system",
    }.get(error.errno or 0, "choose an --output that you may write to")
    return OutputError(
        f"cannot be written: {error.strerror}", where=path, fix=fix + ("; then go on with --resume" * resumable)
    )


# ---------------------------------------------------------------- beside the weights


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


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees all of it or what was there before, also after a power failure."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    sync(fresh)
    fresh.replace(path)


def read_plan(path: Path) -> FusionPlan:
    """The plan in a file or in a folder's plan.json."""
    path = path / "plan.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise HeadfuseError(
            reason, where=path, fix="`headfuse analyze --output` writes plans; so does `headfuse fuse`"
        ) from None
    return FusionPlan.from_json(text, str(path))


def write_plan(folder: Path, plan: FusionPlan, known: Mapping[str, str] | None = None) -> FusionPlan:
    """Write plan.json with the checksums of the files that are in the folder now; `known` ones are not read again."""
    known = known or {}
    names = sorted(name for name in _visible_files(folder) if name != RESUME and not name.startswith(f"{STATE}/"))
    plan = plan.model_copy(update={"files": {n: known.get(n) or file_sha256(folder / n) for n in names}}).sealed()
    (folder / "plan.json").write_text(plan.to_json())
    return plan


def _visible_files(folder: Path) -> set[str]:
    """Paths in the folder of what plan.json holds checksums of: every file but itself and hidden ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {name.as_posix() for name in names if not any(p.startswith(".") for p in name.parts)} - {"plan.json"}


def verify(folder: Path, apart_from: Collection[str] = ()) -> FusionPlan:
    """Compare every file of a folder that headfuse wrote, but those named, with the checksums in its plan.json.

    Raises:
        HeadfuseError: when there is no plan.json, or one of another kind.
        CheckpointError: naming every file that has changed, is missing, or was not written with the others.
    """
    plan = read_plan(folder)
    fix = "copy or download the folder again; if that does not help, write it once more"
    if not plan.files:
        raise CheckpointError("holds no checksums: this is a plan alone", where=folder / "plan.json", fix=fix)
    try:
        present = _visible_files(folder)
        text = (folder / "plan.json").read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder, fix="check its permissions") from None
    bad = [] if text == plan.to_json() and plan == plan.sealed() else ["plan.json has changed"]
    for name in sorted((present | plan.files.keys()).difference(apart_from)):
        if name not in present:
            bad.append(f"{name} is missing")
        elif name not in plan.files:
            bad.append(f"{name} was not written with the others")
        elif file_sha256(folder / name) != plan.files[name]:
            bad.append(f"{name} has changed")
    if bad:
        raise CheckpointError("; ".join(bad), where=folder, fix=fix)
    return plan
