"""`headfuse analyze`: similarity, redundancy and the proposed plan."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from headfuse.choices import WIDE
from headfuse.cli import options
from headfuse.cli.execute import Document, calm_libraries, execute, log_console
from headfuse.cli.runtime import check_loads, settings_for
from headfuse.cli.say import say
from headfuse.reporting.progress import stages

_CELL_WIDTH = 9
"""Characters of a count with the longest bar: a terminal of 80 columns has no room for more."""

if TYPE_CHECKING:
    from headfuse.planning.analysis import Analysis
    from headfuse.planning.spectrum import SideSpectrum, Spectrum


def analyze(  # a parameter an option: Typer reads them
    ctx: typer.Context,
    model: options.Model,
    budget: options.Budget = None,
    layout: options.Layout = None,
    head_dim: options.HeadDim = None,
    cross_layer: options.CrossLayer = None,
    max_positions: options.MaxPositions = None,
    runtime: options.For = None,
    curves: Annotated[
        bool,
        typer.Option("--curves", help="Predict what every layout loses at every budget.", rich_help_panel=options.KEEP),
    ] = False,
    spectrum: Annotated[
        bool,
        typer.Option(
            "--spectrum", help="Compare weights with random ones, and ranks with costs.", rich_help_panel=options.KEEP
        ),
    ] = False,
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
    """Measure how similar the heads of each layer are, and propose a plan for a budget."""

    def work() -> Document:
        from headfuse.checkpoint.hub import at_revision
        from headfuse.checkpoint.inputs import check_model
        from headfuse.config.command import ANALYZE
        from headfuse.text.documents import check_data

        check_model(model)
        settings, machine = ANALYZE.read(config, options.given(ctx, ANALYZE.names))
        check_loads(runtime, settings)
        check_data(settings.calibration.data)
        source = at_revision(model, revision)
        calm_libraries(verbose)
        settings, why = settings_for(runtime, settings, source, machine.trust_remote_code)
        arguments = {"config": settings, "curves": curves, "spectrum": spectrum, **dict(machine)}
        document = _analyze(source, output, overwrite, log_console(quiet or json_output), **arguments)
        return {**document, "why_layout": why}

    execute(work, render, json_output, quiet, verbose)


def _analyze(model: str, output: Path | None, overwrite: bool, log: Console, **arguments: Any) -> Document:
    """Analyze; with an output folder, also write plan.json, the heat maps and a report there."""
    from headfuse.checkpoint.folder import resolve_model
    from headfuse.checkpoint.output import check_output, output_folder
    from headfuse.planning.analysis import analyze, plot
    from headfuse.planning.curves import plot_curves
    from headfuse.planning.spectrum import plot_spectrum
    from headfuse.reporting.report import write_report

    reads = [resolve_model(model)]
    if output is not None:
        check_output(output, overwrite=overwrite, reads=reads)
    with stages(log, "reading") as show:

        def on_progress(phase: str, done: int, total: int) -> None:
            show(phase, f"layer {done} of {total}", done / total)

        result = analyze(model, on_progress=on_progress, **arguments)
    if output is not None:
        with output_folder(output, overwrite=overwrite, reads=reads) as partial:
            (partial / "plan.json").write_text(result.plan.to_json())
            plot(result, partial)
            write_report(partial / "report.html", partial, analysis=partial, name=f"plan for {result.plan.source.name}")
            if result.curves is not None:
                plot_curves(result.curves, partial / "curves.png")
            if result.spectrum is not None:
                kept = {"key": result.plan.key_channels, "value": result.plan.value_channels}
                plot_spectrum(result.spectrum, kept, partial / "spectrum.png")
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
        "curves": None
        if result.curves is None
        else {name: [vars(point) for point in points] for name, points in result.curves.items()},
        "spectrum": None if result.spectrum is None else _spectrum(result.spectrum),
    }


def _spectrum(found: Spectrum) -> Document:
    from headfuse.planning.spectrum import FIGURES

    def figures(side: SideSpectrum) -> Document:
        return {**{name: getattr(side, name) for name in FIGURES}, **vars(side)}

    layers = [{"key": figures(layer.key), "value": figures(layer.value)} for layer in found.layers]
    return {"correlation": found.correlation, "layers": layers}


def _bar(kept: int, most: int) -> str:
    """The number of heads or channels that a layer keeps, with a bar."""
    digits = len(str(most))
    return f"{kept:>{digits}} " + "█" * max(1, round((_CELL_WIDTH - 1 - digits) * kept / most))


def render(document: Mapping[str, Any], console: Console) -> None:
    """Print redundancy and proposed heads per layer."""
    table = Table(title=f"Similarity of heads (mean over pairs) and plan; KV cache kept: {document['kv_ratio']:.4f}")
    counted, layers = "channels" if document["layout"] in WIDE else "heads", document["layers"]
    for column in ("layer", "key CKA", "key aligned", "value CKA", "value aligned"):
        table.add_column(column, justify="right")
    for side in ("key", "value"):
        table.add_column(f"{side} {counted}")
    most = max(layer[side][counted] for layer in layers for side in ("key", "value"))
    for layer in layers:
        sides = layer["key"], layer["value"]
        figures = [f"{side[name]:.3f}" for side in sides for name in ("cka_redundancy", "redundancy")]
        table.add_row(str(layer["layer_idx"]), *figures, *(_bar(side[counted], most) for side in sides))
    console.print(table)
    if document["curves"] is not None:
        console.print(_curves_table(document["curves"]))
    if document["spectrum"] is not None:
        for side in ("key", "value"):
            console.print(_spectrum_table(document, side))
        say(
            console,
            "Above the edge: singular values of a layer's projection, and of the product with queries or output (the"
            " mean over heads), that no random matrix has. In use and 99%: channels of the cache by their energy. The"
            " last line ranks the layers by a column and by their measured cost: 1 where both agree, 0 where the column"
            " says nothing.",
        )
    say(
        console,
        "CKA compares the weights of two heads, aligned what they compute; at 1 they can be fused without loss."
        f" The {counted} are what each layer keeps.",
    )
    if document["why_layout"]:
        say(console, f"layout {document['layout']}: {document['why_layout']}")
    if document["output"]:
        plan = shlex.quote(str(Path(document["output"], "plan.json")))
        console.print(f"wrote {document['output']}", highlight=False, soft_wrap=True)
        console.print(f"next:\n  headfuse fuse MODEL --plan {plan}", highlight=False, soft_wrap=True)
    else:
        say(console, "With --output FOLDER it writes the plan, for `headfuse fuse --plan`, and a report.")


def _curves_table(curves: Mapping[str, list[Mapping[str, float]]]) -> Table:
    """Predicted loss, a row for each share of the cache and a column for each layout."""
    table = Table(title="Predicted increase in NLL before refinement (nats per token), by layout and KV cache kept")
    table.add_column("kept", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    cells = {name: {round(p["kv_ratio"], 3): f"{p['nll_gap']:.3f}" for p in points} for name, points in curves.items()}
    for kept in sorted(set().union(*cells.values())):
        table.add_row(f"{kept:.3f}", *(column.get(kept, "") for column in cells.values()))
    return table


def _spectrum_table(document: Mapping[str, Any], side: str) -> Table:
    """The figures of one side's spectra, a row for each layer, and their rank correlation with its costs."""
    found, names = document["spectrum"], {
        "rank_above_edge": "above edge", "product_rank": "product", "effective_rank": "in use",
        "channels_99": "99%", "outlier_channels": "outliers",
    }  # fmt: skip
    table = Table(title=f"Spectra of {side}s")
    for column in ("layer", *names.values(), "plan"):
        table.add_column(column, justify="right")
    for layer, spectra in zip(document["layers"], found["layers"], strict=True):
        cells = [f"{spectra[side][name]:.1f}".removesuffix(".0") for name in names]
        table.add_row(str(layer["layer_idx"]), *cells, str(layer[side]["channels"]))
    table.add_section()
    agree = [found["correlation"][side][name] for name in names]
    table.add_row("cost", *("" if value is None else f"{value:+.2f}" for value in agree), "")
    return table
