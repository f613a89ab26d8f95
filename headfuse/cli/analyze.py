"""`headfuse analyze`: similarity, redundancy and the proposed plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from headfuse.cli import options
from headfuse.cli.execute import Document, calm_libraries, execute, log_console
from headfuse.plan import WIDE
from headfuse.reporting.progress import stages

if TYPE_CHECKING:
    from headfuse.planning.analysis import Analysis


def analyze(  # a parameter an option: Typer reads them
    ctx: typer.Context,
    model: options.Model,
    budget: options.Budget = None,
    layout: options.Layout = None,
    head_dim: options.HeadDim = None,
    runtime: options.For = None,
    method: options.Method = None,
    allocator: options.Allocator = None,
    grouping: options.Grouping = None,
    preset: options.Preset = None,
    config: options.Config = None,
    seed: options.Seed = None,
    data: options.Data = None,
    samples: options.Samples = None,
    sequence_length: options.SequenceLength = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Head similarity, redundancy, and the plan that a budget leads to."""

    def work() -> Document:
        from headfuse.checkpoint.hub import at_revision
        from headfuse.checkpoint.inputs import check_model
        from headfuse.config.command import ANALYZE
        from headfuse.text.documents import check_data

        check_model(model)
        wanted = {**options.given(ctx, ANALYZE.names), "layout": options.layout_for(runtime, layout)}
        settings, machine = ANALYZE.read(config, wanted)
        check_data(settings.calibration.data)
        source = at_revision(model, revision)
        calm_libraries(verbose)
        return _analyze(source, output, overwrite, log_console(quiet or json_output), config=settings, **dict(machine))

    execute(work, render, json_output, quiet, verbose)


def _analyze(model: str, output: Path | None, overwrite: bool, log: Console, **arguments: Any) -> Document:
    """Analyze; with an output folder, also write plan.json and the heat maps there."""
    from headfuse.checkpoint.folder import resolve_model
    from headfuse.checkpoint.output import check_output, output_folder
    from headfuse.planning.analysis import analyze, plot

    reads = [resolve_model(model)]
    if output is not None:
        check_output(output, overwrite=overwrite, reads=reads)
    with stages(log, "reading") as show:
        result = analyze(
            model, on_progress=lambda phase, done, total: show(phase, f"layer {done} of {total}"), **arguments
        )
    if output is not None:
        with output_folder(output, overwrite=overwrite, reads=reads) as partial:
            (partial / "plan.json").write_text(result.plan.to_json())
            plot(result, partial)
    return _document(result, output)


def _document(result: Analysis, output: Path | None) -> Document:
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
                    **vars(keys),
                    "heads": heads["key"][i],
                    "channels": channels["key"][i],
                    "groups": plan.layers[i].key_groups,
                },
                "value": {
                    **vars(values),
                    "heads": heads["value"][i],
                    "channels": channels["value"][i],
                    "groups": plan.layers[i].value_groups,
                },
            }
            for i, (keys, values) in enumerate(zip(result.keys, result.values, strict=True))
        ],
    }


def render(document: Mapping[str, Any], console: Console) -> None:
    """Print redundancy and proposed heads per layer."""
    table = Table(title=f"Redundancy (mean pair similarity) and plan; KV cache kept: {document['kv_ratio']:.4f}")
    counted = "channels" if document["layout"] in WIDE else "heads"
    kept = f"key {counted}", f"value {counted}"
    for column in ("layer", "key CKA", "key aligned", "value CKA", "value aligned", *kept):
        table.add_column(column, justify="right")
    for layer in document["layers"]:
        key, value = layer["key"], layer["value"]
        figures = (key["cka_redundancy"], key["redundancy"], value["cka_redundancy"], value["redundancy"])
        table.add_row(str(layer["layer_idx"]), *(f"{x:.3f}" for x in figures), str(key[counted]), str(value[counted]))
    console.print(table)
    if document["output"]:
        console.print(f"wrote {document['output']}", soft_wrap=True)
