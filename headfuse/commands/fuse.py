"""`headfuse fuse`: convert a model and say what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headfuse.config import load_config
from headfuse.convert import default_output, fuse
from headfuse.layouts import LAYOUTS
from headfuse.planning import check_budget
from headfuse.source import Source


def run(
    *,
    model: str,
    config: str | None,
    overrides: Mapping[str, Any],
    output: Path | None,
    plan: Path | None,
    overwrite: bool,
    resume: bool,
    device: str,
    dtype: str | None,
    trust_remote_code: bool,
    dry_run: bool,
    log: Console,
) -> dict[str, Any]:
    """Run the command; the result document."""
    settings = load_config(config, overrides)
    if dry_run:
        return _dry_run(model, settings, output, trust_remote_code)
    if settings.calibration.data == "default":
        log.print(
            "calibrating on the packaged text, generic prose: --data with text like the model's own use is better"
        )
    with log.status("reading") as status:
        result = fuse(
            model, settings, output=output, plan=plan, overwrite=overwrite, resume=resume, device=device, dtype=dtype,
            trust_remote_code=trust_remote_code,
            on_progress=lambda phase, done, total: status.update(f"{phase}: layer {done} of {total}"),
        )  # fmt: skip
    budget = result.plan.head_budget
    return {
        "schema_version": 1,
        "command": "fuse",
        "output": str(result.output),
        "layout": result.plan.layout,
        "loads_in": LAYOUTS[result.plan.layout].runtimes,
        "kv_ratio": result.plan.kv_ratio,
        "kv_bytes_per_token": {"before": result.kv_bytes_before, "after": result.kv_bytes_after},
        "nll": {"before": result.nll_before, "after": result.nll_after, "text": "held-out calibration windows"},
        "key_heads": list(budget.key_heads),
        "value_heads": list(budget.value_heads),
    }


def _dry_run(model: str, settings: Any, output: Path | None, trust_remote_code: bool) -> dict[str, Any]:
    source = Source.open(model, trust_remote_code)
    budget = check_budget(settings, source.heads)
    checkpoint = source.checkpoint
    layer = sum(s[0] * (s[1] if len(s) > 1 else 1) for n, s in checkpoint.shapes.items() if ".layers.0." in n)
    tokens = settings.calibration.samples * settings.calibration.sequence_length
    width = 4 * source.heads.hidden_size + 2 * source.heads.num_attention_heads * source.heads.head_dim
    return {
        "schema_version": 1,
        "command": "fuse",
        "dry_run": True,
        "output": str(output or default_output(model, source, settings)),
        "layout": settings.layout,
        "kv_ratio": budget.total / source.heads.total_heads,
        "heads": {"source": source.heads.total_heads, "kept": budget.total},
        "source_bytes": checkpoint.nbytes,
        "memory_bytes_estimate": 4 * (layer + tokens * width),
    }


def render(document: Mapping[str, Any], console: Console) -> None:
    """Print the result as a table."""
    if document.get("dry_run"):
        for key in ("output", "layout", "kv_ratio", "heads", "source_bytes", "memory_bytes_estimate"):
            console.print(f"{key}: {document[key]}", soft_wrap=True)
        return
    table = Table(title=f"KV cache kept: {document['kv_ratio']:.4f}")
    for column in ("", "source", "fused"):
        table.add_column(column)
    kv, nll = document["kv_bytes_per_token"], document["nll"]
    table.add_row("KV bytes per token", str(kv["before"]), str(kv["after"]))
    if nll["before"] is not None:
        table.add_row("NLL, held-out calibration text", f"{nll['before']:.4f}", f"{nll['after']:.4f}")
    console.print(table)
    console.print("key heads per layer:   " + " ".join(map(str, document["key_heads"])), soft_wrap=True)
    console.print("value heads per layer: " + " ".join(map(str, document["value_heads"])), soft_wrap=True)
    console.print(f"loads in: {document['loads_in']}", soft_wrap=True)
    console.print(f"wrote {document['output']}", soft_wrap=True)
