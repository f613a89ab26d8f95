"""`headfuse eval`: what a model predicts and weighs, against its baseline and against limits."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headfuse.evaluation.ci_reports import check_summary, write_verdicts
from headfuse.evaluation.gates import GateResult, judge, read_gates
from headfuse.reporting.progress import is_live, stages
from headfuse.reporting.tables import figure_rows, shown_estimate

_NAME_WIDTH = 18
"""Characters of a model's name in a line of the table's head: as many as a figure with its error has."""


def run(
    *,
    model: str,
    data: str = "default",
    baseline: str | None = None,
    gate: str | None = None,
    junit: Path | None = None,
    github_summary: bool = False,
    report: Path | None = None,
    verify: bool = False,
    samples: int = 24,
    sequence_length: int = 512,
    stride: int | None = None,
    tasks: Sequence[str] = (),
    tasks_path: Sequence[str] = (),
    limit: int | None = None,
    passkey: Sequence[int] = (),
    passkey_trials: int = 10,
    memory: int | None = None,
    speed: bool = False,
    seed: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    json_output: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Evaluate, and show the stages on stderr; returns the document that `--json` prints."""
    from headfuse.checkpoint.folder import resolve_model
    from headfuse.checkpoint.plan_file import verify as verify_folder
    from headfuse.evaluation.evaluate import evaluate
    from headfuse.models.model_code import code_state

    gates = [] if gate is None else read_gates(gate)
    check_summary(github_summary)
    if verify:
        verify_folder(resolve_model(model))
    state = code_state(resolve_model(model)) if verify else None
    console = Console(stderr=True)
    console.quiet = (
        quiet or json_output or (verbose and is_live(console))
    )  # a live line and log lines do not go together
    with stages(console, "reading") as show:
        result = evaluate(
            model,
            data=data,
            baseline=baseline,
            samples=samples,
            sequence_length=sequence_length,
            stride=stride,
            tasks=tasks,
            tasks_path=tasks_path,
            limit=limit,
            passkey=passkey,
            passkey_trials=passkey_trials,
            memory=memory,
            speed=speed,
            device=device,
            dtype=dtype,
            threads=threads,
            trust_remote_code=trust_remote_code,
            seed=seed,
            on_stage=lambda stage: show(stage, ""),
        )
    kv_ratio = result.comparison.kv_ratio if result.comparison else None
    document = {
        "schema_version": 1, "command": "eval", "kv_ratio": kv_ratio, "verified": verify, "model_code": state,
        **result.to_dict(),
    }  # fmt: skip
    document["gates"] = [judged.to_dict() for judged in judge(gates, document)]
    write_verdicts(document, junit, github_summary)
    if report is not None:
        from headfuse.reporting.report import write_report

        write_report(report, resolve_model(model), document)
    return document


def render(document: dict[str, Any], console: Console) -> None:
    """Print the tables, the protocol and the verdicts."""
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
    console.print(f"{document['data']}: {document['protocol']}.", highlight=False, soft_wrap=True)
    if document["memory_formula"]:
        console.print(f"Memory: {document['memory_formula']}.", highlight=False, soft_wrap=True)
    if document["verified"]:
        from headfuse.models.model_code import describe

        state = document["model_code"]
        code = f"; {describe(state, 'FOLDER')}" if state else ""
        console.print(f"Verified: every file is as headfuse wrote it{code}.", highlight=False, soft_wrap=True)
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
        console.print(str(GateResult(**judged)), highlight=False, soft_wrap=True)
