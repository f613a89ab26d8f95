"""Reads safetensors weights tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from headfuse.checkpoint.checksums import file_sha256
from headfuse.checkpoint.inputs import is_pointer
from headfuse.checkpoint.quantised import refuse_quantised
from headfuse.checkpoint.weight_files import INDEX, weight_files, weight_map
from headfuse.errors import CheckpointError, UnsupportedModelError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
        self.files = weight_files(folder)
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
                        fix="the shards come from two checkpoints: copy or download the model again",
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
        for name, file in weight_map(folder).items():
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

    @property
    def num_parameters(self) -> int:
        """How many numbers the weight files store."""
        return sum(map(math.prod, self._shapes.values()))

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, checked to be finite.

        The file is read, not memory-mapped: mapped pages count as memory, and truncating a mapped file kills the
        process.
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
        data = torch.empty(num_bytes(self._dtypes[name], self._shapes[name]), dtype=torch.uint8)
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
        """Show some tensors under other names, `names[stored]`. The fingerprint still covers all tensors as stored."""
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
        if is_pointer(path):
            fix = "fetch the model with git lfs pull"
            raise CheckpointError("is a Git LFS pointer, not the weights", where=path, fix=fix) from None
        raise CheckpointError(f"is not a complete safetensors file ({error})", where=path, fix=damaged) from None
    header.pop("__metadata__", None)
    if header.keys() != names:  # the library read other names than a JSON parser does
        raise CheckpointError("is not a complete safetensors file (names)", where=path, fix=damaged)
    return 8 + length, header


def fingerprint(folder: Path) -> str:
    """The fingerprint that identifies a source in plan.json (reads every weight)."""
    return Checkpoint(folder).fingerprint()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite. It tests the extremes, which is 40 times as fast as isfinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all floating-point tensors on one device are finite, with a single wait for the device."""
    extremes = [extreme for tensor in tensors if tensor.numel() for extreme in torch.aminmax(tensor)]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
