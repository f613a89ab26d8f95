"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from headfuse.errors import CheckpointError


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
