"""Skips what needs a device where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a process without a GPU: `scripts/test_devices.sh` starts one that pretends to have it."""
    if torch.cuda.is_available():
        return
    reason = pytest.mark.skip(reason="no GPU: scripts/test_devices.sh pretends one")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(reason)
