"""How the C library reuses freed memory."""

from __future__ import annotations

import ctypes
from typing import Any

REUSED = 2**23
"""Bytes of the largest freed blocks that are used again: mapping each anew takes a quarter of a conversion in page
faults, and larger ones leave gaps that grow with the layers (docs/results/scaling.md)."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt


def keep_freed_blocks() -> None:
    """Let the C library use freed blocks again, where it is glibc."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, REUSED)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def release_freed_blocks() -> None:
    """Return freed blocks to the system, where the C library is glibc: by gaps the heap would grow with every layer."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """A function of the C library; None where it has none of this name, or cannot be asked, as on Windows."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
