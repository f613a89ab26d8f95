"""Checkpoint folders: the only module that opens or writes weight files.

Reading goes tensor by tensor. Writing fills files of a known layout tensor by tensor, in a folder that gets its final
name only when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from headfuse.errors import CheckpointError, HeadfuseError, OutputError, UnsupportedModelError
from headfuse.plan import FusionPlan

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest shard, as in transformers' save_pretrained."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
}
_NEVER_COPIED = {"config.json", "plan.json", "headfuse.yaml", "README.md", INDEX, "train_log.jsonl"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


# ---------------------------------------------------------------- reading


def resolve_model(name: str, revision: str | None = None) -> Path:
    """The local folder of a model: `name` itself, or the download of a hub id.

    Raises:
        CheckpointError: when there is no such folder and no such repository can be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError("is a file", where=name, fix="give the model's folder, the one that holds config.json")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError("no such folder", where=name, fix="give a model folder or a hub id like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.h5", "*.msgpack", "*.gguf"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"neither a local folder nor a repository that the hub gives ({reason})",
            where=name,
            fix="check the path or the id; private repositories need HF_TOKEN; HF_HUB_OFFLINE=1 forbids downloads",
        ) from None


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model config of `folder`.

    Raises:
        CheckpointError: when config.json is missing, is not JSON, or holds values that the family refuses.
        UnsupportedModelError: when transformers does not know the model type.
    """
    path = folder / "config.json"
    raw = _read_json(path, "this is not a model folder; give the one that holds config.json and the weights")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("has no model_type", where=path, fix="use the config.json that came with the model")
    if raw.get("quantization_config"):
        raise UnsupportedModelError(
            "the weights are quantised", where=path, fix="convert the full-precision model, then quantise the result"
        )
    if "auto_map" in raw and model_type != "headfuse" and not trust_remote_code and not _is_known(model_type):
        raise UnsupportedModelError(
            f"model_type {model_type!r} needs its own code", where=path, fix="pass --trust-remote-code if you trust it"
        )
    if model_type == "headfuse":
        import headfuse.modeling  # noqa: F401  registers the family
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the strict configs of transformers raise many kinds
        reason = " ".join(str(error).split())[:300]
        if not _is_known(model_type):
            reason = f"model_type {model_type!r} is not known to the installed transformers"
        raise CheckpointError(reason, where=path, fix="use the config.json that came with the model") from None


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path, fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=path, fix=fix) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON: {error}", where=path, fix="restore the original file") from None
    if not isinstance(value, dict):
        raise CheckpointError("must hold a JSON object", where=path, fix="restore the original file")
    return value


class Checkpoint:
    """The safetensors weights of a folder, read tensor by tensor.

    Args:
        folder: a local model folder.

    Raises:
        CheckpointError: for missing, pickled, truncated, empty or corrupt files, missing shards, and an index that
            names a file outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  no mapping
                self._file_of[name] = file
                entry = handle.get_slice(name)
                self.shapes[name] = tuple(entry.get_shape())
                code = entry.get_dtype()
                if code not in DTYPES:
                    raise UnsupportedModelError(
                        f"tensor {name} has dtype {code}",
                        where=folder / file,
                        fix="convert a full-precision checkpoint",
                    )
                self.dtypes[name] = DTYPES[code]
        if not self._file_of:
            raise CheckpointError("holds no tensors", where=folder / self.files[0], fix="restore the original file")

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"is not a complete safetensors file ({error})",
                    where=self.folder / file,
                    fix="it is damaged or cut off: copy or download it again",
                ) from None
        return self._handles[file]

    @property
    def nbytes(self) -> int:
        """Size of all weight files in bytes."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, checked to be finite."""
        try:
            tensor: torch.Tensor = self._open(self._file_of[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} cannot be read ({error})", where=self.folder) from None
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"tensor {name} holds NaN or infinity",
                where=self.folder / self._file_of[name],
                fix="the weights are damaged: take a checkpoint from before they diverged",
            )
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._file_of


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).exists():
        index = _read_json(folder / INDEX, "restore the original file")
        weight_map = index.get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())
        ):
            raise CheckpointError("has no weight_map", where=folder / INDEX, fix="restore the original file")
        files = sorted(set(weight_map.values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors") or "\\" in file:
                raise CheckpointError(
                    f"names {file!r}, which is not a safetensors file of this folder",
                    where=folder / INDEX,
                    fix="shard names must be plain file names; do not use an index from a source that you do not trust",
                )
            if not (folder / file).is_file():
                raise CheckpointError("this shard is missing", where=folder / file, fix="copy or download it again")
        return files
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
    if pickles:
        raise CheckpointError(
            f"the weights are pickled ({pickles[0]}), and unpickling runs code",
            where=folder,
            fix="convert them once, where you trust them: load with transformers, then save_pretrained(folder)",
        )
    raise CheckpointError(f"no weights: neither {SINGLE} nor {INDEX}", where=folder, fix="copy or download the weights")


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and the weight files: what plan.json knows a source by."""
    digest = hashlib.sha256()
    for file in ["config.json", *_weight_files(folder)]:
        digest.update(file_sha256(folder / file).encode())
    return digest.hexdigest()


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
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None


def _digest(stream: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- writing


class SafetensorsWriter:
    """Writes safetensors files whose tensors are known by name, dtype and shape before the first one is computed.

    The files get their full size at once, so a full disk shows before the work; tensors may come in any order, each
    is written once; what is already written can be read back.

    Args:
        folder: where the files go.
        tensors: name -> (dtype, shape), in file order.
        resume: continue files that an interrupted run left.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], resume: bool = False
    ) -> None:
        self.folder = folder
        self._place: dict[str, tuple[str, int]] = {}
        self.dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
        self._spec = dict(tensors)
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
        for name in names:
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
        if resume and path.exists() and path.stat().st_size == start + offset:
            return
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.flush()
            _reserve(stream.fileno(), start + offset)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor at its place, in the dtype that the file was laid out with."""
        dtype, shape = self._spec[name]
        if tuple(tensor.shape) != tuple(shape):
            raise AssertionError(f"{name}: laid out as {shape}, computed as {tuple(tensor.shape)}")
        file, offset = self._place[name]
        data = tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8)
        with (self.folder / file).open("r+b") as stream:
            stream.seek(offset)
            stream.write(data.numpy().tobytes())

    def read(self, name: str) -> torch.Tensor:
        """Read back a tensor that was written before."""
        dtype, shape = self._spec[name]
        file, offset = self._place[name]
        with (self.folder / file).open("rb") as stream:
            stream.seek(offset)
            data = bytearray(stream.read(_nbytes(dtype, shape)))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


def _reserve(descriptor: int, size: int) -> None:
    """Give the file its full size now, so that a full disk is found before the work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


RESUME = "resume.json"
STATE = "state"
_LOCK = ".lock"


@contextlib.contextmanager
def output_folder(path: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Yields `<path>.partial/`, locked against a second process. On success `state/` and `resume.json` are removed and
    the folder is renamed. After a failure it stays only where `resume.json` says that something can go on.

    Raises:
        OutputError: when the output exists without `overwrite`, an interrupted run is in the way, another process
            writes the same output, or the disk refuses.
    """
    partial = partial_folder(path)
    check_output(path, overwrite=overwrite, resume=resume)
    try:
        if partial.exists() and overwrite and not resume:
            with _locked(partial):
                pass
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _output_error(path, error) from None
    with _locked(partial):
        try:
            yield partial
            shutil.rmtree(partial / STATE, ignore_errors=True)
            (partial / RESUME).unlink(missing_ok=True)
            _replace(partial, path, overwrite)
        except BaseException as error:
            if partial.exists() and not (partial / RESUME).exists():
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise _output_error(path, error) from None
            raise


_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
}


def partial_folder(path: Path) -> Path:
    """Where an output is built."""
    return path.with_name(path.name + ".partial")


def check_output(path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Raise OutputError, before any work, when `path` cannot be the output of a new run."""
    if path.exists() and not overwrite:
        raise OutputError(
            "the output already exists", where=path, fix="pass --overwrite to replace it, or another --output"
        )
    if (partial_folder(path) / RESUME).exists() and not (resume or overwrite):
        raise OutputError(
            "an interrupted run is here",
            where=partial_folder(path),
            fix="pass --resume to go on, or --overwrite to start anew",
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        stream = (folder / _LOCK).open("w")
    except OSError as error:
        raise _output_error(folder, error) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                "another process is writing here", where=folder, fix="wait for it, or choose another --output"
            ) from None
        yield


def _replace(partial: Path, path: Path, overwrite: bool) -> None:
    (partial / _LOCK).unlink(missing_ok=True)
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if not path.exists():
        partial.rename(path)
    elif overwrite:
        old = path.with_name(path.name + ".old")
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    else:
        raise OutputError("the output appeared while this run was working", where=path, fix="choose another --output")
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_error(path: Path, error: OSError) -> OutputError:
    fix = {
        errno.ENOSPC: "free some space or choose an --output on another disk",
        errno.EDQUOT: "free some of your quota or choose an --output on another disk",
        errno.EFBIG: "raise the limit on file size (ulimit -f) or choose another file system",
    }.get(error.errno or 0, "choose an --output that you may write to")
    return OutputError(f"cannot be written: {error.strerror}", where=path, fix=fix)


# ---------------------------------------------------------------- beside the weights


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config, licence and other small files; never weights, code or pickles.

    The folder's own headfuse model code, which a decoupled checkpoint needs, comes from the installed package instead.
    """
    copied = []
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name in _NEVER_COPIED or path.name.startswith("."):
            continue
        if path.suffix in _WEIGHT_SUFFIXES | {".py", ".pyc", ".so", ".ipynb", ".sh"} or path.name.endswith(
            ".index.json"
        ):
            continue
        shutil.copyfile(path, target / path.name)
        copied.append(path.name)
    raw = _read_json(target / "config.json", "") if (target / "config.json").exists() else {}
    if raw.get("model_type") == "headfuse":
        from headfuse.modeling import MODELING_FILES

        for file in MODELING_FILES:
            shutil.copyfile(file, target / file.name)
            copied.append(file.name)
    return copied


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees all of it or what was there before."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
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


def write_plan(folder: Path, plan: FusionPlan) -> FusionPlan:
    """Write plan.json with the checksums of the files that are in the folder now."""
    skipped = {"plan.json", _LOCK, RESUME}
    files = {p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name not in skipped}
    plan = plan.model_copy(update={"files": files})
    (folder / "plan.json").write_text(plan.to_json())
    return plan
