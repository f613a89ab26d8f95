"""`headfuse export`: the same model in a layout that another runtime loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from headfuse import choices
from headfuse.cli import options
from headfuse.cli.execute import Document, calm_libraries, execute, log_console
from headfuse.cli.options import OUTPUT, one_of
from headfuse.cli.say import say
from headfuse.reporting.progress import stages


def export(  # a parameter an option: Typer reads them
    model: options.Model,
    to: Annotated[
        choices.Target | None,
        typer.Option(
            metavar=one_of(choices.Target),
            help="Layout of the output folder, or gguf: one file for llama.cpp.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    file_type: Annotated[
        choices.FileType | None,
        typer.Option(
            "--type",
            metavar=one_of(choices.FileType),
            help="Number format in a GGUF file; by default f16.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    refresh: Annotated[
        bool,
        typer.Option("--refresh", help="Renew the model code of a folder in place.", rich_help_panel=OUTPUT),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=options.path,
            metavar="PATH",
            help="Output folder or GGUF file.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Rewrite a model in another layout without loss, or renew the model code in its folder."""
    if (to is None) != refresh or (refresh and (output or file_type or overwrite)):
        raise typer.BadParameter("give --to, or --refresh alone")

    def work() -> Document:
        from headfuse.checkpoint.hub import at_revision
        from headfuse.checkpoint.inputs import check_model

        check_model(model)
        calm_libraries(verbose)
        if to is None:
            return _refresh(model)
        from headfuse.conversion.export import write_export
        from headfuse.conversion.export_plan import check_export, plan_export

        plan = plan_export(
            at_revision(model, revision), to, output=output, file_type=file_type, trust_remote_code=trust_remote_code
        )
        check_export(plan, overwrite)
        before, after = plan.kv_bytes
        log, counts = log_console(quiet or json_output), plan.num_key_value_heads
        _announce(log, plan.architecture, counts, before, after)
        with stages(log, "writing") as show:
            written = write_export(
                plan, file_type=file_type or "f16", overwrite=overwrite,
                on_progress=lambda done, total: show("writing", f"tensor {done} of {total}", done / total),
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

    execute(work, render, json_output, quiet, verbose)


def _announce(log: Console, architecture: str, counts: Sequence[int], before: int, after: int) -> None:
    """Print what will be written."""
    say(log, f"{architecture}, KV heads per layer: {' '.join(map(str, counts))}")
    log.print(f"KV bytes per token: {before:,} -> {after:,}", highlight=False)
    if after > before:
        log.print(
            "The cache grows: this layout needs equal groups shared by keys and values, so some heads are stored twice."
        )


def _refresh(model: str) -> Document:
    """Renew the model code of a folder."""
    from headfuse.models.model_code import refresh

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
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    kv = document["kv_bytes_per_token"]
    table.add_row("KV bytes per token", f"{kv['before']:,}", f"{kv['after']:,}")
    console.print(table)
    console.print(f"loads as {document['architecture']}", soft_wrap=True, highlight=False)
    console.print(f"wrote {document['output']}", soft_wrap=True, highlight=False)
