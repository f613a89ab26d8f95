"""Writes safetensors files of a known layout tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headfuse.checkpoint.disk import reserve, sync
from headfuse.checkpoint.reader import DTYPE_CODES, is_finite, num_bytes
from headfuse.checkpoint.weight_files import INDEX, SINGLE
from headfuse.errors import HeadfuseError, OutputError

SHARD_BYTES = 5 * 10**9
"""Largest shard, as in transformers' save_pretrained."""


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
            if shards[-1] and size + num_bytes(*spec) > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += num_bytes(*spec)
        count = len(shards)
        self.files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for file, names in zip(self.files, shards, strict=True):
            self._lay_out(file, names, resume)
        if count > 1:
            weight_map = {name: self._place[name][0] for name in tensors}
            total = sum(num_bytes(*spec) for spec in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: str, names: list[str], resume: bool) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in sorted(names, key=lambda name: -self._spec[name][0].itemsize):  # so that each is aligned
            dtype, shape = self._spec[name]
            end = offset + num_bytes(dtype, shape)
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
            reserve(stream.fileno(), start + offset)
        self._hashed[file] = hashlib.sha256(len(text).to_bytes(8, "little") + text), start

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place, in the dtype of the file."""
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
        """Flush written data to disk, so that no record of it survives without it."""
        for file in self.files:
            sync(self.folder / file)

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the files that were written from beginning to end; other files must be read."""
        whole = {file: (self.folder / file).stat().st_size for file in self._hashed}
        return {file: digest.hexdigest() for file, (digest, end) in self._hashed.items() if end == whole[file]}

    def read(self, name: str) -> torch.Tensor:
        """Read back a tensor that was written before."""
        dtype, shape = self._spec[name]
        file, offset = self._place[name]
        with (self.folder / file).open("rb") as stream:
            stream.seek(offset)
            data = bytearray(stream.read(num_bytes(dtype, shape)))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)


def mapped_tensor(path: Path, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that is mapped to a file: writes go to the file, and a new file holds zeros."""
    with path.open("ab") as stream:
        reserve(stream.fileno(), num_bytes(dtype, tuple(shape)))
    size = math.prod(shape)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(tuple(shape))
