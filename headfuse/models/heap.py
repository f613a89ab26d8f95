"""How the C library reuses freed memory, and in which pages it comes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

REUSED = 2**23
"""Largest freed block, in bytes, that the heap reuses. Without reuse, page faults take a quarter of a conversion.
Larger blocks would leave gaps that grow with every layer (docs/results/scaling.md).
"""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Let PyTorch ask Linux for pages of 2 MiB, unless the user has decided; call it before PyTorch's first tensor.

    A conversion has a quarter of the page faults then, and half of the time in the system.
    """
    if _HUGE_PAGES.exists() and "[madvise]" in _HUGE_PAGES.read_text(encoding="utf-8"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_blocks() -> None:
    """Let the C library reuse freed blocks, if it is glibc."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, REUSED)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def release_freed_blocks() -> None:
    """Return freed blocks to the OS, if the C library is glibc; else fragmentation grows the heap with every layer."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """A function of the C library; None if there is no such function, or no way to look it up, as on Windows."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
