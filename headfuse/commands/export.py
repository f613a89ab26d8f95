"""`headfuse export`: the same model in a layout that another runtime loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headfuse.choices import Target
from headfuse.conversion.export import check_export, export, plan_export
from headfuse.models.model_code import refresh
from headfuse.reporting.progress import stages


def run(
    *,
    model: str,
    to: Target,
    output: Path | None,
    file_type: str | None,
    overwrite: bool,
    trust_remote_code: bool,
    log: Console,
) -> dict[str, Any]:
    """Say what will be written, on stderr; write it; the result document."""
    plan = plan_export(model, to, output=output, file_type=file_type, trust_remote_code=trust_remote_code)
    check_export(plan, overwrite)
    before, after = plan.kv_bytes
    counts = plan.num_key_value_heads
    log.print(f"{plan.architecture}, KV heads per layer: {' '.join(map(str, counts))}", soft_wrap=True, highlight=False)
    log.print(f"KV bytes per token: {before} -> {after}", highlight=False)
    if after > before:
        log.print("more than before: heads are repeated, as this layout has equal groups that keys and values share")
    with stages(log, "writing") as report:
        written = export(
            plan, file_type=file_type or "f16", overwrite=overwrite,
            on_progress=lambda done, total: report("writing", f"tensor {done} of {total}"),
        )  # fmt: skip
    return {
        "schema_version": 1,
        "command": "export",
        "output": str(written),
        "to": to,
        "architecture": plan.architecture,
        "kv_ratio": after / (plan.folder.source_heads * plan.folder.heads.head_dim * plan.itemsize),
        "kv_bytes_per_token": {"before": before, "after": after},
        "num_key_value_heads": list(counts),
    }


def run_refresh(model: str) -> dict[str, Any]:
    """Renew the model code of a folder; the result document."""
    folder, changed = refresh(model)
    return {"schema_version": 1, "command": "export", "output": str(folder), "to": None, "refreshed": changed}


def render(document: Mapping[str, Any], console: Console) -> None:
    """Print the result as a table, or what was renewed."""
    if document["to"] is None:
        done = ", ".join(document["refreshed"])
        text = f"renewed {done} in {document['output']}" if done else f"{document['output']} is up to date"
        console.print(text, soft_wrap=True, highlight=False)
        return
    table = Table()
    for column in ("", "before", "after"):
        table.add_column(column)
    kv = document["kv_bytes_per_token"]
    table.add_row("KV bytes per token", str(kv["before"]), str(kv["after"]))
    console.print(table)
    console.print(f"loads as {document['architecture']}", soft_wrap=True, highlight=False)
    console.print(f"wrote {document['output']}", soft_wrap=True, highlight=False)
