"""`headfuse report`: one HTML file about a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from headfuse.checkpoint.plan_file import read_plan
from headfuse.reporting.report import read_document, write_report


def run(*, folder: Path, figures: Path | None, analysis: Path | None, output: Path) -> dict[str, Any]:
    """Run the command; the result document."""
    document = None if figures is None else read_document(figures)
    write_report(output, folder, document, analysis)
    kv_ratio = None if document is None else document["kv_ratio"]
    if (folder / "plan.json").is_file():
        kv_ratio = read_plan(folder).kv_ratio
    return {"schema_version": 1, "command": "report", "output": str(output), "kv_ratio": kv_ratio}


def render(document: Mapping[str, Any], console: Console) -> None:
    """Print where it is."""
    console.print(f"wrote {document['output']}", soft_wrap=True)
