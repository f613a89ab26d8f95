"""`headfuse uptrain`: train a fused model for a few tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from headfuse.uptrain import Progress

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_tokens(text: str) -> int:
    """A number of tokens: `246000`, `500k`, `50M` or `1.5B`.

    Raises:
        ValueError: for anything else, and for less than one token.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().replace("_", "").upper())
    tokens = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if tokens < 1:
        raise ValueError(f"{text!r} is not a number of tokens such as 246000, 500k, 50M or 1.5B")
    return tokens


def run(
    *,
    model: str,
    data: str,
    tokens: int,
    teacher: str | None = None,
    loss: Literal["kl", "ce"] = "kl",
    learning_rate: float | None = None,
    batch_size: int | None = None,
    gradient_accumulation: int = 1,
    sequence_length: int = 512,
    output: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    log_every: int = 1,
    checkpoint_every: int | None = None,
    trust_remote_code: bool = False,
    json_output: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Train, with a progress bar where stderr is a terminal; returns the document that `--json` prints."""
    from headfuse.checkpoint import read_plan
    from headfuse.uptrain import uptrain

    with _progress_bar(hidden=quiet or json_output or verbose) as on_progress:
        result = uptrain(
            model,
            data=data,
            tokens=tokens,
            teacher=teacher,
            loss=loss,
            learning_rate=learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            sequence_length=sequence_length,
            output=output,
            overwrite=overwrite,
            resume=resume,
            seed=seed,
            device=device,
            dtype=dtype,
            threads=threads,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            trust_remote_code=trust_remote_code,
            on_progress=on_progress,
        )
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
    console.print(
        f"NLL per token on {windows} held-out windows of {recipe['sequence_length']} tokens of {document['data']}."
        f" Trained on {document['tokens']:,} tokens in {document['steps']} steps and {document['seconds']:.0f} s"
        f" ({document['tokens_per_second']:,.0f} tokens/s), loss {recipe['loss']},"
        f" peak learning rate {recipe['learning_rate']:g}.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"wrote {document['output']}", highlight=False, soft_wrap=True)


@contextmanager
def _progress_bar(hidden: bool) -> Iterator[Callable[[Progress], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("uptrain"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=hidden or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("uptrain", total=None, loss=float("nan"), speed=0.0)

        def on_progress(now: Progress) -> None:
            bar.update(task, completed=now.step, total=now.steps, loss=now.loss, speed=now.tokens_per_second)

        yield on_progress
