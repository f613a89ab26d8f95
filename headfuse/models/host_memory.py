"""Main memory that is free for this process: on the machine, and within the limits of its container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FILES = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Limit and use of a control group: of version 2, and of version 1 by the name of its controller."""


def free_host_bytes() -> int | None:
    """Bytes of main memory that this process can still take; None where psutil is missing."""
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return None
    return max(0, min([psutil.virtual_memory().available, *_left_by_groups()]))


def _left_by_groups() -> Iterator[int]:
    """What each control group of this process leaves to it; one without a limit leaves more than there is."""
    try:
        lines = _OWN.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for controllers, own in (line.split(":", 2)[1:] for line in lines):
        controller = next((name for name in controllers.split(",") if name in _FILES), None)
        if controller is None:
            continue
        group = _GROUPS / controller / own.lstrip("/")
        for folder in (group, *group.parents):
            if folder == _GROUPS.parent:
                break
            try:
                limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in _FILES[controller])
                if limit.isdecimal():
                    yield int(limit) - int(used) + _reclaimable(folder)
            except OSError:  # a container sees its own groups alone, at the top
                continue


def _reclaimable(folder: Path) -> int:
    """Bytes of files that the system drops first, which its use counts."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
