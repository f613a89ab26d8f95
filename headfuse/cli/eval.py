"""`headfuse eval`: a model's quality and size, compared with its baseline and with limits."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from headfuse.choices import CacheDtype, Dtype, RulerTask, names
from headfuse.cli import options
from headfuse.cli.execute import Document, calm_libraries, execute, log_console
from headfuse.cli.options import CI, HOW, MACHINE, TEXT, one_of
from headfuse.cli.say import say
from headfuse.reporting.progress import is_live, stages
from headfuse.reporting.tables import figure_rows, protocol, shown_estimate

_NAME_WIDTH = 18
"""Characters of a model's name per line of the table head: as many as a figure with its error."""


def _memory(text: str) -> int:
    from headfuse.config.values import parse_memory

    return options.usage(parse_memory, text)


Tasks = Annotated[
    str | None, typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness to run.", rich_help_panel=HOW)
]
TasksPath = Annotated[
    list[str] | None,
    typer.Option(metavar="FOLDER", help="Folder of local task files; may be repeated.", rich_help_panel=HOW),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions per task; by default all.", rich_help_panel=HOW)]
Passkey = Annotated[
    str | None,
    typer.Option(metavar="N,N", help="Passkey retrieval test at these context lengths.", rich_help_panel=HOW),
]
Ruler = Annotated[
    str | None,
    typer.Option(metavar="N,N", help="Long-context tasks like RULER's, at these context lengths.", rich_help_panel=HOW),
]
RulerTasks = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help=f"Tasks of --ruler: {', '.join(names(RulerTask))}; by default all.", rich_help_panel=HOW
    ),
]
RulerTrials = Annotated[int, typer.Option(min=1, help="Prompts for each --ruler task and length.", rich_help_panel=HOW)]
Trials = Annotated[int, typer.Option(min=1, help="Prompts of each passkey length.", rich_help_panel=HOW)]
Memory = Annotated[
    int | None,
    typer.Option(
        parser=_memory,
        metavar="SIZE",
        help="Report the longest context and the largest batch that fit into this memory, such as 24GB.",
        rich_help_panel=HOW,
    ),
]
CacheNumbers = Annotated[
    CacheDtype | None,
    typer.Option(
        metavar=one_of(CacheDtype),
        help="Simulate a KV cache of this dtype; the baseline keeps its own.",
        rich_help_panel=HOW,
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens between the beginnings of two windows; by default windows do not overlap.",
        rich_help_panel=TEXT,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(parser=options.path, metavar="PATH", help="Write the results as one HTML file.", rich_help_panel=CI),
]


def evaluate(  # a parameter an option: Typer reads them
    ctx: typer.Context,
    model: options.Model,
    baseline: Annotated[
        str | None, typer.Option(help="Model to compare with, usually the source.", rich_help_panel=HOW)
    ] = None,
    tasks: Tasks = None,
    tasks_path: TasksPath = None,
    limit: Limit = None,
    passkey: Passkey = None,
    passkey_trials: Trials = 10,
    ruler: Ruler = None,
    ruler_tasks: RulerTasks = None,
    ruler_trials: RulerTrials = 10,
    cache_dtype: CacheNumbers = None,
    memory: Memory = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure decoding speed against the baseline.", rich_help_panel=HOW)
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="First compare every file with its checksum in plan.json.", rich_help_panel=HOW),
    ] = False,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="YAML file of options.", rich_help_panel=HOW)
    ] = None,
    seed: options.Seed = None,
    data: options.Data = None,
    samples: options.Samples = 24,
    sequence_length: options.SequenceLength = 512,
    stride: Stride = None,
    device: options.Device = "auto",
    dtype: Annotated[
        Dtype | None, typer.Option(metavar=one_of(Dtype), help="Dtype to compute in.", rich_help_panel=MACHINE)
    ] = None,
    threads: options.Threads = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    gate: options.Gates = None,
    junit: options.Junit = None,
    github_summary: options.Summary = False,
    report: Report = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure perplexity, agreement with a baseline, tasks, retrieval, memory and speed; judge gates."""

    def work() -> Document:
        from headfuse.checkpoint.folder import resolve_model
        from headfuse.checkpoint.hub import at_revision
        from headfuse.checkpoint.inputs import check_exists, check_model, check_writable
        from headfuse.checkpoint.plan_file import plan_in
        from headfuse.config.command import EVALUATE
        from headfuse.evaluation.ci_reports import check_summary
        from headfuse.evaluation.gates import judge, read_gates
        from headfuse.text.documents import check_data

        gates = [] if gate is None else read_gates(gate)
        check_model(model)
        settings, machine = EVALUATE.read(config, options.given(ctx, EVALUATE.names))
        check_model(settings.baseline)
        check_data(settings.data)
        for folder in settings.tasks_path:
            check_exists(Path(folder), "give the folder of the task files", folder=True)
        check_writable(report, junit)
        source = at_revision(model, revision)
        check_summary(github_summary)
        calm_libraries(verbose)
        if report is not None:
            plan_in(resolve_model(source))  # an error now, and not after the work
        silent = quiet or json_output or (verbose and is_live(log_console(False)))  # a live line and a log do not mix
        document = _evaluate(source, verify, log_console(silent), config=settings, **dict(machine))
        document["gates"] = [judged.to_dict() for judged in judge(gates, document)]
        return document

    def files(document: Document) -> None:
        from headfuse.checkpoint.folder import resolve_model
        from headfuse.checkpoint.hub import at_revision
        from headfuse.evaluation.ci_reports import write_verdicts

        write_verdicts(document, junit, github_summary)
        if report is not None:
            from headfuse.reporting.report import write_report

            write_report(report, resolve_model(at_revision(model, revision)), document)

    execute(work, render, json_output, quiet, verbose, files)


def _evaluate(model: str, verified: bool, log: Console, **arguments: Any) -> Document:
    """Verify a folder where that is asked for; evaluate, and show the stages."""
    from headfuse.checkpoint.folder import resolve_model
    from headfuse.checkpoint.plan_file import verify
    from headfuse.evaluation.evaluate import evaluate
    from headfuse.models.model_code import code_state

    if verified:
        verify(resolve_model(model))
    state = code_state(resolve_model(model)) if verified else None
    with stages(log, "reading") as show:
        result = evaluate(model, on_stage=lambda stage: show(stage, ""), **arguments)
    kv_ratio = result.comparison.kv_ratio if result.comparison else None
    return {
        "schema_version": 1, "command": "eval", "kv_ratio": kv_ratio, "verified": verified, "model_code": state,
        **result.to_dict(),
    }  # fmt: skip


def render(document: dict[str, Any], console: Console) -> None:
    """Print the tables, the protocol and the verdicts."""
    from headfuse.evaluation.gates import GateResult

    model, baseline, comparison = document["model"], document["baseline"], document["comparison"]
    shown = [model] if baseline is None else [model, baseline]
    table = Table()
    table.add_column("")
    for role, figures in zip(("model", "baseline"), shown, strict=False):
        name = textwrap.fill(figures["name"], _NAME_WIDTH)  # a name gives way, a figure does not
        table.add_column(f"{role}\n{name}", justify="right", overflow="fold")
    if comparison is not None:
        table.add_column("model to baseline", justify="right")
    for name, cells, ratio in figure_rows(document):
        table.add_row(name, *cells, *([ratio] if comparison is not None else []))
    console.print(table)
    say(console, protocol(document))
    if document["cache_protocol"]:
        say(console, f"{document['cache_protocol']}.")
    if document["memory_formula"]:
        say(console, f"Memory: {document['memory_formula']}.")
    if document["verified"]:
        from headfuse.models.model_code import describe

        state = document["model_code"]
        code = f"; {describe(state, 'FOLDER')}" if state else ""
        say(console, f"Verified: every file is as headfuse wrote it{code}.")
    agreement = document["agreement"]
    if agreement is not None:
        parts = Table(title="agreement with the baseline")
        for column in ("part", "tokens", "KL, nats per token", "same top token", "NLL gap"):
            parts.add_column(column, justify="left" if column == "part" else "right")
        for part in [agreement["overall"], *agreement["domains"], *agreement["positions"]]:
            values = [shown_estimate(part[key]) for key in ("kl", "top1_agreement", "nll_gap")]
            parts.add_row(part["part"], f"{part['kl']['samples']:,}", *values)
        console.print(parts)
    for judged in document["gates"]:
        say(console, str(GateResult(**judged)))
