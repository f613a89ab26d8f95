"""`headfuse uptrain`: train a fused model for a few tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from headfuse.reporting.progress import is_live, stages

if TYPE_CHECKING:
    from headfuse.training.loop import Progress


def run(
    *,
    model: str,
    overwrite: bool = False,
    resume: bool = False,
    json_output: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train, and show the steps on stderr; returns the document that `--json` prints.

    `options` are those of `headfuse.uptrain`.
    """
    from headfuse.checkpoint.plan_file import read_plan
    from headfuse.training.uptrain import uptrain

    other = os.environ.get("RANK", "0") != "0"
    console = Console(stderr=True)
    console.quiet = quiet or json_output or other or (verbose and is_live(console))
    with _shown(console) as on_progress:
        result = uptrain(model, overwrite=overwrite, resume=resume, on_progress=on_progress, **options)
    kv_ratio = read_plan(result.output).kv_ratio if (result.output / "plan.json").exists() else None
    return {"schema_version": 1, "command": "uptrain", "kv_ratio": kv_ratio, **result.to_dict()}


def render(document: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table()
    table.add_column("model")
    table.add_column("NLL", justify="right")
    for name, key in (("source", "nll_teacher"), ("before", "nll_before"), ("after", "nll_after")):
        if document[key] is not None:
            table.add_row(name, f"{document[key]:.4f}")
    console.print(table)
    recipe, windows = document["recipe"], document["validation_windows"]
    text = recipe["validation_data"] or f"{document['data']}, held out"
    best = f", of which step {document['best_step']} was the best" * (document["best_step"] != document["steps"])
    console.print(
        f"NLL per token on {windows} windows of {recipe['sequence_length']} tokens of {text}."
        f" Trained on {document['tokens']:,} tokens in {document['steps']} steps{best} and {document['seconds']:.0f} s"
        f" ({document['tokens_per_second']:,.0f} tokens/s), loss {recipe['loss']},"
        f" peak learning rate {recipe['learning_rate']:g}.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"wrote {document['output']}", highlight=False, soft_wrap=True)


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[Progress], None]]:
    """What shows the steps: a live line on a terminal, else plain lines."""
    if is_live(console):
        with _live(console) as on_progress:
            yield on_progress
        return
    with stages(console, "preparing") as report:

        def on_step(now: Progress) -> None:
            state = f"step {now.step} of {now.steps}, loss {now.loss:.3f}, {now.tokens_per_second:,.0f} tokens/s"
            if now.validation is not None:
                state += f", validation NLL {now.validation:.3f}"
            report("training", state)

        yield on_step


@contextmanager
def _live(console: Console) -> Iterator[Callable[[Progress], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("uptrain"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, validation NLL {task.fields[validation]}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s, left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bar(*columns, console=console, disable=console.quiet, transient=True) as bar:
        task = bar.add_task("uptrain", total=None, loss=float("nan"), validation="-", speed=0.0)

        def on_progress(now: Progress) -> None:
            validation = "-" if now.validation is None else f"{now.validation:.3f}"
            bar.update(
                task,
                completed=now.step,
                total=now.steps,
                loss=now.loss,
                validation=validation,
                speed=now.tokens_per_second,
            )

        yield on_progress
