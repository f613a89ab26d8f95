"""`headfuse fuse`: convert a model and print the result."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from headfuse.choices import WIDE
from headfuse.cli import options
from headfuse.cli.execute import Document, calm_libraries, execute, log_console
from headfuse.cli.options import KEEP, OUTPUT
from headfuse.cli.runtime import check_loads, settings_for
from headfuse.cli.say import say
from headfuse.estimates import mean
from headfuse.reporting.progress import stages

if TYPE_CHECKING:
    from headfuse.config.fuse import FuseConfig
    from headfuse.conversion.result import FuseResult


def fuse(  # a parameter an option: Typer reads them
    ctx: typer.Context,
    model: options.Model,
    budget: options.Budget = None,
    layout: options.Layout = None,
    head_dim: options.HeadDim = None,
    cross_layer: options.CrossLayer = None,
    max_positions: options.MaxPositions = None,
    runtime: options.For = None,
    plan: Annotated[
        Path | None, typer.Option(help="Apply this plan.json instead of making one.", rich_help_panel=KEEP)
    ] = None,
    method: options.Method = None,
    allocator: options.Allocator = None,
    grouping: options.Grouping = None,
    preset: options.Preset = None,
    config: options.Config = None,
    seed: options.Seed = None,
    data: options.Data = None,
    samples: options.Samples = None,
    sequence_length: options.SequenceLength = None,
    random_tokens: options.RandomTokens = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    dtype: options.WrittenDtype = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Run all checks, then print sizes and estimates of time and memory.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    device: options.Device = "auto",
    placement: options.Placement = "auto",
    compute_dtype: options.ComputeDtype = "float32",
    threads: options.Threads = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    gate: options.Gates = None,
    junit: options.Junit = None,
    github_summary: options.Summary = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fuse the heads of a model and write it with a smaller KV cache."""

    def work() -> Document:
        from headfuse.checkpoint.hub import at_revision
        from headfuse.checkpoint.inputs import check_exists, check_model, check_writable
        from headfuse.config.command import FUSE
        from headfuse.evaluation.ci_reports import check_summary
        from headfuse.evaluation.gates import FUSE_METRICS, judge, read_gates
        from headfuse.text.documents import check_data

        gates = [] if gate is None else read_gates(gate, FUSE_METRICS)
        check_model(model)
        settings, machine = FUSE.read(config, options.given(ctx, FUSE.names))
        check_loads(runtime, settings)
        check_data(settings.calibration.data)
        check_exists(plan, "`headfuse analyze --output` writes plans; so does `headfuse fuse`")
        check_writable(junit)
        source = at_revision(model, revision)
        check_summary(github_summary)
        calm_libraries(verbose)
        settings, why = settings_for(runtime, settings, source, machine.trust_remote_code, plan)
        place = {"output": output, "plan": plan, "overwrite": overwrite, "resume": resume, **dict(machine)}
        if dry_run:
            return {**_dry_run(source, settings, place), "why_layout": why}
        result = _fuse(source, settings, place, log_console(quiet or json_output))
        document = {**_document(result), "why_layout": why, **_sizes(source, result.output)}
        document["next"] = _next(source, result.output, runtime, machine.trust_remote_code)
        document["gates"] = [judged.to_dict() for judged in judge(gates, _gated(result))]
        return document

    def files(document: Document) -> None:
        from headfuse.evaluation.ci_reports import write_verdicts

        if not dry_run:
            write_verdicts(document, junit, github_summary)

    execute(work, render, json_output, quiet, verbose, files)


def _fuse(model: str, settings: FuseConfig, place: Mapping[str, Any], log: Console) -> FuseResult:
    """Convert, and show the stages."""
    from headfuse.conversion.convert import fuse

    if settings.calibration.bundled:
        say(
            log,
            "Calibrating on bundled English prose and Python. Other languages and chats lose more: "
            "pass --data with text like your inputs.",
        )
    with stages(log, "reading") as show:

        def on_progress(phase: str, done: int, total: int) -> None:
            show(phase, f"{done} of {total}", done / total)

        return fuse(model, settings, on_progress=on_progress, **place)


def _document(result: FuseResult) -> Document:
    from headfuse.layouts import loads_in

    budget = result.plan.head_budget
    return {
        "schema_version": 1,
        "command": "fuse",
        "output": str(result.output),
        "layout": result.plan.layout,
        "loads_in": loads_in(result.plan),
        "kv_ratio": result.plan.kv_ratio,
        "kv_bytes_per_token": {"before": result.kv_bytes_before, "after": result.kv_bytes_after},
        "kv_bytes_per_token_in": {runtime: after for runtime, (_, after) in result.kv_bytes_in.items()},
        "source_kv_bytes_per_token_in": {runtime: before for runtime, (before, _) in result.kv_bytes_in.items()},
        "nll": {"before": result.nll_before, "after": result.nll_after, "text": "held-out calibration windows"},
        "stages": [{"name": stage.name, "nll": stage.nll, "kept": stage.kept} for stage in result.stages],
        "key_heads": list(budget.key_heads),
        "value_heads": list(budget.value_heads),
        "key_channels": result.plan.key_channels,
        "value_channels": result.plan.value_channels,
    }


def _sizes(model: str, output: Path) -> dict[str, dict[str, int]]:
    """Number and bytes of the stored weights, for the source and for the output."""
    from headfuse.checkpoint.folder import resolve_model
    from headfuse.checkpoint.reader import Checkpoint

    before, after = Checkpoint(resolve_model(model)), Checkpoint(output)
    return {
        "parameters": {"before": before.num_parameters, "after": after.num_parameters},
        "weight_bytes": {"before": before.nbytes, "after": after.nbytes},
    }


def _next(model: str, output: Path, runtime: str | None, trust_remote_code: bool) -> list[str]:
    """Suggested next commands, on the same revision of the source."""
    fused, source = shlex.quote(str(output)), shlex.quote(model)
    trust = " --trust-remote-code" * trust_remote_code
    return [
        f"headfuse eval {fused} --baseline {source} --data TEXT{trust}",
        f"headfuse uptrain {fused} --teacher {source} --data TEXT --tokens 50M{trust}",
        *([f"headfuse export {fused} --to gguf --output {fused}.gguf"] if runtime == "llama.cpp" else []),
    ]


def _gated(result: FuseResult) -> dict[str, Any]:
    """Figures of the held-out calibration windows that a gate can read, named as in `eval`."""

    def estimates(name: str, values: Sequence[float], exponential: str) -> dict[str, float | None]:
        if not values:
            return {}
        found = mean(values)
        power = math.exp(found.value) if found.value < 700 else None
        error = None if power is None or found.stderr is None else power * found.stderr  # delta method
        return {name: found.value, f"{name}_stderr": found.stderr, exponential: power, f"{exponential}_stderr": error}

    before, after = result.held_out_before, result.held_out_after
    gaps = [a - b for a, b in zip(after, before, strict=True)]
    return {
        "model": {**estimates("nll", after, "perplexity"), "kv_bytes_per_token": result.kv_bytes_after},
        "baseline": {**estimates("nll", before, "perplexity"), "kv_bytes_per_token": result.kv_bytes_before},
        "comparison": {**estimates("nll_gap", gaps, "ppl_ratio"), "kv_ratio": result.plan.kv_ratio},
        "windows": len(after),
    }


def _dry_run(model: str, settings: FuseConfig, place: Mapping[str, Any]) -> Document:
    """Make every check of a run; return what it would write and cost."""
    from headfuse.checkpoint.reader import DTYPE_NAMES
    from headfuse.conversion.cost import estimate, on_device
    from headfuse.conversion.long_runs import advice
    from headfuse.conversion.preflight import prepare

    prepared = prepare(model, settings, **place)
    source, settings, kept = prepared.source, prepared.config, prepared.kv_channels
    machine, dtype = prepared.machine, prepared.machine.dtype
    cost = estimate(source, settings, prepared.speed, prepared.device, machine.placement)
    device = on_device(source, prepared.device, machine.placement)
    itemsize = next(iter(source.checkpoint.dtypes.values())).itemsize if dtype is None else DTYPE_NAMES[dtype].itemsize
    heads = source.heads
    return {
        "schema_version": 1,
        "command": "fuse",
        "dry_run": True,
        "output": str(prepared.output),
        "layout": settings.layout,
        "kv_ratio": kept / heads.kv_channels,
        "kv_bytes_per_token": {"before": heads.kv_channels * itemsize, "after": kept * itemsize},
        "heads": {"source": heads.total_heads, "kept": kept // heads.head_dim},
        "source_bytes": source.checkpoint.nbytes,
        "estimate": {"memory_bytes": cost.memory_bytes, "seconds": cost.seconds, "device": device},
        "advice": advice(source, settings, machine.compute_dtype, prepared.device, prepared.speed),
    }


def render(document: Mapping[str, Any], console: Console) -> None:
    """Print the result as a table."""
    from headfuse.evaluation.gates import GateResult

    if document.get("dry_run"):
        from headfuse.conversion.long_runs import duration

        kv, cost = document["kv_bytes_per_token"], document["estimate"]
        console.print(f"would write {document['output']}, layout {document['layout']}", soft_wrap=True)
        if document["why_layout"]:
            say(console, f"layout {document['layout']}: {document['why_layout']}")
        console.print(f"KV cache kept: {document['kv_ratio']:.4f}, {kv['before']} -> {kv['after']} bytes per token")
        console.print(
            f"about {cost['memory_bytes'] / 1e9:.1f} GB of memory and {duration(cost['seconds'])} on this machine"
        )
        if document["advice"]:
            say(console, f"long: {document['advice']}")
        if cost["device"]:
            on = cost["device"]
            console.print(f"about {on['memory_bytes'] / 1e9:.1f} GB on {on['name']}, placement {on['placement']}")
        return
    console.print(_table(document))
    for stage in document["stages"]:
        if not stage["kept"]:
            say(console, f"Stage '{stage['name']}' is undone: with it, the held-out NLL was {stage['nll']:.4f}.")
    counted = "channels" if document["layout"] in WIDE else "heads"
    reason = f": {document['why_layout']}" if document["why_layout"] else ""
    say(console, f"layout {document['layout']}{reason}")
    say(console, f"key {counted} per layer:   " + " ".join(map(str, document[f"key_{counted}"])))
    say(console, f"value {counted} per layer: " + " ".join(map(str, document[f"value_{counted}"])))
    for judged in document["gates"]:
        say(console, str(GateResult(**judged)))
    console.print(f"wrote {document['output']}", highlight=False, soft_wrap=True)
    say(console, f"loads in {document['loads_in']}")
    console.print("next:", *document["next"], sep="\n  ", highlight=False, soft_wrap=True)


def _table(document: Mapping[str, Any]) -> Table:
    """Sizes and quality, before and after."""
    table = Table(title=f"KV cache kept: {document['kv_ratio']:.4f}")
    table.add_column("")
    table.add_column("source", justify="right")
    table.add_column("fused", justify="right")
    names = {
        "kv_bytes_per_token": "KV bytes per token", "weight_bytes": "weights, bytes", "parameters": "parameters",
    }  # fmt: skip
    for key, name in names.items():
        table.add_row(name, *(f"{document[key][side]:,}" for side in ("before", "after")))
        for runtime, kept in document["kv_bytes_per_token_in"].items() if key == "kv_bytes_per_token" else ():
            if kept != document[key]["after"]:
                table.add_row(f"  in {runtime}", f"{document['source_kv_bytes_per_token_in'][runtime]:,}", f"{kept:,}")
    nll = document["nll"]
    if nll["before"] is not None:
        table.add_row("NLL, held-out calibration text", f"{nll['before']:.4f}", f"{nll['after']:.4f}")
    return table
