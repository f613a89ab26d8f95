"""How the C library reuses freed memory."""

from __future__ import annotations

import ctypes

REUSED = 2**23
"""Bytes of the largest freed blocks that are used again: mapping each anew takes a quarter of a conversion in page
faults, and larger ones leave gaps that grow with the layers (docs/scaling.md)."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt


def keep_freed_blocks() -> None:
    """Let the C library use freed blocks again, where it is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, REUSED)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def release_freed_blocks() -> None:
    """Give them back to the system: by the gaps between blocks that stay, the heap would grow with every layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
