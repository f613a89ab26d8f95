"""The plan of a folder, and plans with other layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def plan_of(folder: Path) -> dict[str, Any]:
    """The document plan.json."""
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return plan


def with_layers(plan: dict[str, Any], path: Path, *layers: dict[str, Any]) -> Path:
    """The file of a plan with other layers."""
    numbered = [{"layer_idx": i, **layer} for i, layer in enumerate(layers)]
    path.write_text(json.dumps({**plan, "layers": numbered, "files": {}, "seal": None}))
    return path
