"""`headfuse report`: one HTML file about a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from headfuse.cli import options
from headfuse.cli.execute import Document, calm_libraries, execute
from headfuse.cli.options import OUTPUT, TEXT


def report(
    folder: Annotated[Path, typer.Argument(help="Model folder.", show_default=False)],
    figures: Annotated[
        Path | None,
        typer.Option(
            parser=options.path,
            metavar="PATH",
            help="Results of `headfuse eval --json`.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    analysis: Annotated[
        Path | None,
        typer.Option(
            parser=options.path,
            metavar="PATH",
            help="Folder of `headfuse analyze --output`, for heat maps.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", parser=options.path, metavar="PATH", help="Output file.", rich_help_panel=OUTPUT
        ),
    ] = Path("report.html"),
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write an HTML report about a fused model: one file."""

    def work() -> Document:
        from headfuse.checkpoint.inputs import check_exists, check_writable

        check_exists(folder, "give the folder of a model", folder=True)
        check_exists(figures, "write it with `headfuse eval ... --json > FILE`")
        check_exists(analysis, "write it with `headfuse analyze -o FOLDER`", folder=True)
        check_writable(output)
        calm_libraries(verbose)
        return _report(folder, figures, analysis, output)

    execute(work, render, json_output, quiet, verbose)


def _report(folder: Path, figures: Path | None, analysis: Path | None, output: Path) -> Document:
    from headfuse.checkpoint.plan_file import plan_in
    from headfuse.reporting.report import read_document
    from headfuse.reporting.written import report

    written = report(folder, figures=figures, analysis=analysis, output=output)
    plan = plan_in(folder)
    kv_ratio = plan.kv_ratio if plan else None if figures is None else read_document(figures)["kv_ratio"]
    return {"schema_version": 1, "command": "report", "output": str(written), "kv_ratio": kv_ratio}


def render(document: Mapping[str, Any], console: Console) -> None:
    """Print where it is."""
    console.print(f"wrote {document['output']}", highlight=False, soft_wrap=True)
