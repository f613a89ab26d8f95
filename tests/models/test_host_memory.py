"""Free main memory: of the machine, and of the container that the process is in."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from headfuse.models import host_memory
from headfuse.models.host_memory import free_host_bytes


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "_OWN", tmp_path / "own")
    return tmp_path / "cgroup"


def limit(group: Path, own: str, files: dict[str, str]) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name).write_text(text)
    (group / "memory.stat").write_text("anon 5\ninactive_file 100\nfile 200\n")
    (host_memory._OWN).write_text(own)


VERSION_1 = {"memory.limit_in_bytes": "4000\n", "memory.usage_in_bytes": "1500\n"}
VERSION_2 = {"memory.max": "4000\n", "memory.current": "1500\n"}


@pytest.mark.parametrize(
    ("folder", "own", "files"),
    [
        ("", "0::/\n", VERSION_2),
        ("job/step", "0::/job/step/task\n", VERSION_2),  # the limit is that of a group above
        ("memory/job", "7:cpu,cpuacct:/other\n4:memory:/job\n0::/\n", VERSION_1),
        ("memory", "4:memory:/docker/8f2c\n", VERSION_1),  # the path is the host's
    ],
)
def test_the_limit_of_a_container(groups: Path, folder: str, own: str, files: dict[str, str]) -> None:
    """Files that the system drops first count as free."""
    limit(groups / folder, own, files)
    assert free_host_bytes() == 4000 - 1500 + 100


def test_no_limit_and_no_groups(groups: Path) -> None:
    rest = psutil.virtual_memory().total // 2
    assert abs(free_host_bytes() - psutil.virtual_memory().available) < rest
    limit(groups, "0::/\n", {"memory.max": "max\n", "memory.current": "1500\n"})
    assert abs(free_host_bytes() - psutil.virtual_memory().available) < rest


def test_nothing_is_left(groups: Path) -> None:
    limit(groups, "0::/\n", {"memory.max": "1000\n", "memory.current": "1500\n"})
    assert free_host_bytes() == 0
