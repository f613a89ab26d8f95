"""`headfuse uptrain`: train a fused model for a few tokens."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from headfuse import choices
from headfuse.cli import options
from headfuse.cli.execute import Document, calm_libraries, execute, is_first_process, log_console
from headfuse.cli.options import HOW, MACHINE, OUTPUT, TEXT, one_of
from headfuse.cli.say import say
from headfuse.reporting.progress import is_live, stages

if TYPE_CHECKING:
    from headfuse.training.loop import Progress


def _tokens(text: str) -> int:
    from headfuse.config.values import parse_tokens

    return options.usage(parse_tokens, text)


Tokens = Annotated[
    int | None,
    typer.Option(
        parser=_tokens, metavar="N", help="Number of training tokens, such as 500k, 50M or 1.5B.", rich_help_panel=TEXT
    ),
]
Mixture = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT[=SHARE]",
        help="Training text, as for fuse. Repeat it with shares to mix texts: a.jsonl=0.7.",
        rich_help_panel=TEXT,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option("--config", "-c", help="YAML file of options, or the name of a packaged recipe.", rich_help_panel=HOW),
]
Teacher = Annotated[
    str | None, typer.Option(help="Source model; by default the one named in plan.json.", rich_help_panel=HOW)
]
Loss = Annotated[
    choices.Loss | None,
    typer.Option(
        metavar=one_of(choices.Loss),
        help="kl (default): divergence from the teacher; ce: cross-entropy.",
        rich_help_panel=HOW,
    ),
]
Trained = Annotated[
    choices.Trained | None,
    typer.Option(
        metavar="PART", help="Weights to train: all (default), attention, or lora: adapters.", rich_help_panel=HOW
    ),
]
LearningRate = Annotated[
    float | None, typer.Option(metavar="RATE", min=0, help="Peak learning rate.", rich_help_panel=HOW)
]
BatchSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Windows per forward pass and process.", rich_help_panel=HOW)
]
Accumulation = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Forward passes per step.", rich_help_panel=HOW)
]
Patience = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Stop after this many validations without a better one.", rich_help_panel=HOW
    ),
]
Packing = Annotated[
    choices.Packing | None,
    typer.Option(
        metavar=one_of(choices.Packing),
        help="joined (default): tokens attend to earlier documents in their window; separate: only to their own.",
        rich_help_panel=TEXT,
    ),
]
ValidationData = Annotated[
    str | None,
    typer.Option(help="Text for validation; by default sections of --data are held out.", rich_help_panel=TEXT),
]
ValidationWindows = Annotated[
    int | None, typer.Option(min=1, help="Number of windows in a validation.", rich_help_panel=TEXT)
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(min=1, help="Steps between two validations, each with a checkpoint.", rich_help_panel=OUTPUT),
]
LogEvery = Annotated[
    int, typer.Option(min=1, help="Steps between two lines of train_log.jsonl.", rich_help_panel=OUTPUT)
]
Trackers = Annotated[
    list[str] | None,
    typer.Option("--tracker", metavar="NAME", help="tensorboard or wandb; may be repeated.", rich_help_panel=OUTPUT),
]
TrackerFolder = Annotated[
    Path,
    typer.Option(parser=options.path, metavar="PATH", help="Folder that trackers write to.", rich_help_panel=OUTPUT),
]
ComputeDtype = Annotated[
    choices.ComputeDtype | None,
    typer.Option(
        metavar=one_of(choices.ComputeDtype),
        help="Dtype of products, also of the teacher's; default: bfloat16 on a GPU that has it, else float32.",
        rich_help_panel=MACHINE,
    ),
]
TeacherDevice = Annotated[
    choices.Device | None,
    typer.Option(metavar=one_of(choices.Device), help="Device of the teacher.", rich_help_panel=MACHINE),
]
TeacherDtype = Annotated[
    choices.Dtype | None,
    typer.Option(metavar=one_of(choices.Dtype), help="Dtype in which the teacher computes.", rich_help_panel=MACHINE),
]
TeacherCache = Annotated[
    Path | None,
    typer.Option(
        parser=options.path,
        metavar="PATH",
        help="Folder that stores the teacher's last hidden states, so that it need not stay in memory.",
        rich_help_panel=MACHINE,
    ),
]


def uptrain(  # a parameter an option: Typer reads them
    ctx: typer.Context,
    model: options.Model,
    tokens: Tokens = None,
    data: Mixture = None,
    sequence_length: options.SequenceLength = None,
    packing: Packing = None,
    validation_data: ValidationData = None,
    validation_windows: ValidationWindows = None,
    config: Recipe = None,
    teacher: Teacher = None,
    loss: Loss = None,
    train: Trained = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    gradient_accumulation: Accumulation = None,
    patience: Patience = None,
    seed: options.Seed = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    dtype: options.WrittenDtype = None,
    checkpoint_every: CheckpointEvery = None,
    log_every: LogEvery = 1,
    trackers: Trackers = None,
    tracker_folder: TrackerFolder = Path("runs"),
    device: options.Device = "auto",
    compute_dtype: ComputeDtype = None,
    threads: options.Threads = None,
    teacher_device: TeacherDevice = None,
    teacher_dtype: TeacherDtype = None,
    teacher_cache: TeacherCache = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a fused model for a few tokens, by default to match its source."""

    def work() -> Document:
        from headfuse.checkpoint.hub import at_revision
        from headfuse.checkpoint.inputs import check_model
        from headfuse.config.command import UPTRAIN
        from headfuse.text.documents import check_data

        check_model(model, teacher)
        recipe, machine = UPTRAIN.read(config, options.given(ctx, UPTRAIN.names))
        for text in [*recipe.data, *filter(None, [recipe.validation_data])]:
            check_data(text)
        fused = at_revision(model, revision)
        calm_libraries(verbose)
        silent = quiet or json_output or not is_first_process() or (verbose and is_live(log_console(False)))
        return _uptrain(
            fused, log_console(silent), config=recipe, teacher=teacher, output=output, overwrite=overwrite,
            resume=resume, **dict(machine),
        )  # fmt: skip

    execute(work, render, json_output, quiet, verbose)


def _uptrain(model: str, log: Console, **arguments: Any) -> Document:
    """Train, and show the steps."""
    from headfuse.checkpoint.plan_file import plan_in
    from headfuse.training.uptrain import uptrain

    with _shown(log) as on_progress:
        result = uptrain(model, on_progress=on_progress, **arguments)
    plan = plan_in(result.output)
    kv_ratio = None if plan is None else plan.kv_ratio
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
    say(
        console,
        f"NLL per token on {windows} windows of {recipe['sequence_length']} tokens of {text}."
        f" Trained on {document['tokens']:,} tokens in {document['steps']} steps{best} and {document['seconds']:.0f} s"
        f" ({document['tokens_per_second']:,.0f} tokens/s), loss {recipe['loss']},"
        f" peak learning rate {recipe['learning_rate']:g}.",
    )
    console.print(f"wrote {document['output']}", highlight=False, soft_wrap=True)
    trained, teacher = shlex.quote(str(document["output"])), shlex.quote(str(document["teacher"] or "SOURCE"))
    following = f"headfuse eval {trained} --baseline {teacher} --data TEXT"
    console.print(f"next:\n  {following}", highlight=False, soft_wrap=True)


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Shows the steps: a live line on a terminal, else plain lines."""
    if is_live(console):
        with _live(console) as on_progress:
            yield on_progress
        return
    with stages(console, "preparing") as report:

        def on_step(now: Progress) -> None:
            state = f"step {now.step} of {now.steps}, loss {now.loss:.3f}, {_speed(now)}"
            if now.validation is not None:
                state += f", validation NLL {now.validation:.3f}"
            report("training", state, now.step / now.steps)

        yield on_step


def _speed(now: Progress) -> str:
    share = "" if now.mfu is None else f", {now.mfu:.0%} of the peak"
    return f"{now.tokens_per_second:,.0f} tokens/s{share}"


@contextmanager
def _live(console: Console) -> Iterator[Callable[[Progress], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("uptrain"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, validation NLL {task.fields[validation]}"),
        TextColumn("{task.fields[speed]}, left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bar(*columns, console=console, disable=console.quiet, transient=True) as bar:
        task = bar.add_task("uptrain", total=None, loss=float("nan"), validation="-", speed="0 tokens/s")

        def on_progress(now: Progress) -> None:
            validation = "-" if now.validation is None else f"{now.validation:.3f}"
            bar.update(
                task,
                completed=now.step,
                total=now.steps,
                loss=now.loss,
                validation=validation,
                speed=_speed(now),
            )

        yield on_progress
