"""`headfuse analyze`: similarity, redundancy and the proposed plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headfuse.checkpoint.folder import resolve_model
from headfuse.checkpoint.output import check_output, output_folder
from headfuse.config.fuse import load_config
from headfuse.layouts import LAYOUTS
from headfuse.planning.analysis import analyze, plot
from headfuse.reporting.progress import stages


def run(
    *,
    model: str,
    config: str | None,
    overrides: Mapping[str, Any],
    output: Path | None,
    overwrite: bool,
    device: str,
    trust_remote_code: bool,
    log: Console,
) -> dict[str, Any]:
    """Run the command; with an output folder, also write plan.json and the heat maps there."""
    settings, reads = load_config(config, overrides), [resolve_model(model)]
    if output is not None:
        check_output(output, overwrite=overwrite, reads=reads)
    with stages(log, "reading") as report:
        result = analyze(
            model, settings, device=device, trust_remote_code=trust_remote_code,
            on_progress=lambda phase, done, total: report(phase, f"layer {done} of {total}"),
        )  # fmt: skip
    if output is not None:
        with output_folder(output, overwrite=overwrite, reads=reads) as partial:
            (partial / "plan.json").write_text(result.plan.to_json())
            plot(result, partial)
    plan, budget = result.plan, result.plan.head_budget
    channels = {"key": plan.key_channels, "value": plan.value_channels}
    heads = {"key": budget.key_heads, "value": budget.value_heads}
    return {
        "schema_version": 1,
        "command": "analyze",
        "output": None if output is None else str(output),
        "layout": plan.layout,
        "kv_ratio": plan.kv_ratio,
        "layers": [
            {
                "layer_idx": i,
                "key": {
                    **vars(keys), "heads": heads["key"][i], "channels": channels["key"][i],
                    "groups": plan.layers[i].key_groups,
                },
                "value": {
                    **vars(values), "heads": heads["value"][i], "channels": channels["value"][i],
                    "groups": plan.layers[i].value_groups,
                },
            }
            for i, (keys, values) in enumerate(zip(result.keys, result.values, strict=True))
        ],
    }  # fmt: skip


def render(document: Mapping[str, Any], console: Console) -> None:
    """Print redundancy and proposed heads per layer."""
    table = Table(title=f"Redundancy (mean pair similarity) and plan; KV cache kept: {document['kv_ratio']:.4f}")
    counted = "channels" if LAYOUTS[document["layout"]].wide else "heads"
    kept = f"key {counted}", f"value {counted}"
    for column in ("layer", "key CKA", "key aligned", "value CKA", "value aligned", *kept):
        table.add_column(column, justify="right")
    for layer in document["layers"]:
        key, value = layer["key"], layer["value"]
        figures = (key["cka_redundancy"], key["redundancy"], value["cka_redundancy"], value["redundancy"])
        counts = str(key[counted]), str(value[counted])
        table.add_row(str(layer["layer_idx"]), *(f"{x:.3f}" for x in figures), *counts)
    console.print(table)
    if document["output"]:
        console.print(f"wrote {document['output']}", soft_wrap=True)
