"""The command line: declares options, imports lazily, prints, and catches HeadfuseError once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headfuse import __version__
from headfuse.checkpoint.hub import at_revision
from headfuse.config.presets import PRESETS
from headfuse.errors import HeadfuseError

_UsageError: Any = typer.BadParameter.__mro__[1]
"""click's class; typer brings its own copy of click or not, so it has no import that always works."""


class _Commands(TyperGroup):
    """The commands; a usage error is one JSON document, too, where `--json` was given."""

    as_json = False
    not_utf8: str | None = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self.as_json = "--json" in args
        self.not_utf8 = next((arg for arg in args if not _is_utf8(arg)), None)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            if self.not_utf8 is not None:
                raise _UsageError(f"{os.fsencode(self.not_utf8)!r} is not UTF-8: rename the file or folder", ctx)
            return super().invoke(ctx)
        except _UsageError as error:
            error.message = error.message.replace("Input should be", "must be")  # newer typer: pydantic's words
            if self.as_json:
                _print_failure(error.format_message(), None, "see --help")
            raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fuse the key and value heads of a causal language model into a smaller KV cache.",
)


class LayoutName(str, Enum):
    """Layouts that `fuse` writes."""

    decoupled = "decoupled"
    layerwise = "layerwise"
    gqa = "gqa"
    latent = "latent"


class Runtime(str, Enum):
    """Runtimes that `--for` knows."""

    transformers = "transformers"
    vllm = "vllm"
    llama_cpp = "llama.cpp"
    sglang = "sglang"


class PresetName(str, Enum):
    """Presets of `fuse`."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class DeviceName(str, Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class DtypeName(str, Enum):
    """Dtypes of written weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class TargetName(str, Enum):
    """What `export` writes."""

    gqa = "gqa"
    layerwise = "layerwise"
    gguf = "gguf"


class FileType(str, Enum):
    """Numbers in a GGUF file."""

    f16 = "f16"
    f32 = "f32"
    q8_0 = "q8_0"


class LossName(str, Enum):
    """Losses of `uptrain`."""

    kl = "kl"
    ce = "ce"


class TrainedName(str, Enum):
    """What `uptrain` trains."""

    all = "all"
    attention = "attention"
    lora = "lora"


class PackingName(str, Enum):
    """Whether documents in a window see each other."""

    joined = "joined"
    separate = "separate"


def _is_utf8(argument: str) -> bool:
    """Whether an argument was UTF-8: Python keeps other bytes as lone surrogates."""
    return not any("\udc80" <= character <= "\udcff" for character in argument)


def _path(text: str) -> Path:
    if not text:  # Path("") would be the working directory: an unset variable of a script
        raise typer.BadParameter("the name is empty")
    return Path(text)


def _budget(text: str) -> str:
    from headfuse.config.values import parse_budget

    try:
        parse_budget(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text.strip()


def _tokens(text: str) -> int:
    from headfuse.config.values import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _memory(text: str) -> int:
    from headfuse.evaluation.capacity import parse_memory

    try:
        return parse_memory(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _names(text: str | None, where: str) -> list[str]:
    """Names between commas; none of an option that is not given."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if text is not None and not names:  # an unset variable of a script: nothing would be measured
        raise HeadfuseError("names nothing", where=where, fix="give one or more, or leave the option out")
    return names


def _lengths(text: str | None) -> list[int]:
    parts = _names(text, "--passkey")
    if not all(part.isdigit() for part in parts):
        raise HeadfuseError(
            f"{text!r} is not a list of token counts", where="--passkey", fix="give counts such as 512,2048"
        )
    return [int(part) for part in parts]


Model = Annotated[str, typer.Argument(help="Model folder or hub id: org/name, org/name@revision.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", "-b", parser=_budget, metavar="SHARE", help="Kept KV bytes over the source's: 0.25 or 1/4."
    ),
]
Method = Annotated[str | None, typer.Option(help="subspace (default), align, mean, first; dha trains.")]
Allocator = Annotated[str | None, typer.Option(help="sensitivity (default), taylor, shapley, dha-greedy or uniform.")]
Grouping = Annotated[str | None, typer.Option(help="cluster (default), neighbours or anneal.")]
Layout = Annotated[LayoutName | None, typer.Option(help="How the result lies on disk.")]
For = Annotated[Runtime | None, typer.Option("--for", help="Pick the layout that this runtime loads.")]
Preset = Annotated[
    PresetName | None, typer.Option(help="; ".join(f"{name}: {preset.cost}" for name, preset in PRESETS.items()) + ".")
]
Data = Annotated[
    str | None, typer.Option(help="Text or chats: .txt, .jsonl, .csv, .parquet, a folder, or a hub dataset id.")
]
Samples = Annotated[int | None, typer.Option(min=2, help="Windows of text.")]
SequenceLength = Annotated[int | None, typer.Option(min=8, help="Tokens per window.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", parser=_path, metavar="PATH", help="Output folder.")]
Config = Annotated[str | None, typer.Option("--config", "-c", help="YAML file or the name of a packaged config.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed.")]
Device = Annotated[DeviceName, typer.Option(help="Where to compute.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Dtype of the written weights; default the source's.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.")]
Gates = Annotated[
    str | None, typer.Option(metavar="GATES", help="Limits to keep, or a YAML file of them; exit code 3 if not.")
]
Junit = Annotated[
    Path | None, typer.Option(parser=_path, metavar="PATH", help="Write the gates' verdicts as JUnit XML.")
]
Summary = Annotated[bool, typer.Option("--github-summary", help="Add them to the GitHub job's summary page.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the output path.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more; tracebacks of unexpected errors.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow the source's own code.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"headfuse {__version__}")
        raise typer.Exit


@app.command()
def analyze(
    model: Model,
    budget: Budget = None,
    method: Method = None,
    allocator: Allocator = None,
    grouping: Grouping = None,
    layout: Layout = None,
    runtime: For = None,
    preset: Preset = None,
    data: Data = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    output: Output = None,
    config: Config = None,
    overwrite: Overwrite = False,
    seed: Seed = None,
    device: Device = DeviceName.auto,
    threads: Threads = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Head similarity, redundancy, and the plan that a budget leads to."""

    def work() -> tuple[dict[str, Any], Any]:
        from headfuse.checkpoint.inputs import check_model
        from headfuse.config.fuse import load_config
        from headfuse.text.documents import check_data

        check_model(model)
        overrides = _overrides(
            budget, method, allocator, grouping, layout, runtime, preset, data, samples, sequence_length, seed
        )
        check_data(load_config(config, overrides).calibration.data)
        _prepare(threads, verbose)
        from headfuse.commands import analyze as command

        document = command.run(
            model=at_revision(model, revision),
            config=config, overrides=overrides, output=output, overwrite=overwrite, device=device.value,
            trust_remote_code=trust_remote_code, log=_log(quiet or json_output),
        )  # fmt: skip
        return document, command.render

    _execute(work, json_output, quiet, verbose)


@app.command()
def fuse(
    model: Model,
    budget: Budget = None,
    method: Method = None,
    allocator: Allocator = None,
    grouping: Grouping = None,
    layout: Layout = None,
    runtime: For = None,
    preset: Preset = None,
    data: Data = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    output: Output = None,
    config: Config = None,
    plan: Annotated[Path | None, typer.Option(help="Apply a reviewed plan.json.")] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    seed: Seed = None,
    device: Device = DeviceName.auto,
    dtype: Dtype = None,
    threads: Threads = None,
    gate: Gates = None,
    junit: Junit = None,
    github_summary: Summary = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that a run checks first; print sizes and estimates.")
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write a checkpoint with a smaller KV cache."""

    def work() -> tuple[dict[str, Any], Any]:
        from headfuse.checkpoint.inputs import check_exists, check_model, check_writable
        from headfuse.config.fuse import load_config
        from headfuse.evaluation.gates import FUSE_METRICS, read_gates
        from headfuse.text.documents import check_data

        if gate is not None:
            read_gates(gate, FUSE_METRICS)
        check_model(model)
        overrides = _overrides(
            budget, method, allocator, grouping, layout, runtime, preset, data, samples, sequence_length, seed
        )
        check_data(load_config(config, overrides).calibration.data)
        check_exists(plan, "`headfuse analyze --output` writes plans; so does `headfuse fuse`")
        check_writable(junit)
        _prepare(threads, verbose)
        from headfuse.commands import fuse as command

        document = command.run(
            model=at_revision(model, revision),
            config=config, overrides=overrides, output=output, plan=plan, overwrite=overwrite,
            resume=resume, device=device.value, dtype=dtype and dtype.value, trust_remote_code=trust_remote_code,
            dry_run=dry_run, gate=gate, junit=junit, github_summary=github_summary,
            log=_log(quiet or json_output),
        )  # fmt: skip
        return document, command.render

    _execute(work, json_output, quiet, verbose)


@app.command()
def uptrain(
    model: Model,
    tokens: Annotated[
        int | None, typer.Option(parser=_tokens, metavar="N", help="Training tokens: 246000, 50M, 1.5B.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT[=SHARE]", help="Training text, as for fuse; or several, with shares."),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="YAML file or the name of a packaged recipe.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Source model; default the one that plan.json names.")] = None,
    teacher_device: Annotated[DeviceName | None, typer.Option(help="Where the teacher computes.")] = None,
    teacher_dtype: Annotated[DtypeName | None, typer.Option(help="Dtype in which the teacher computes.")] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            parser=_path, metavar="PATH", help="Folder for the teacher's last states; it is not in memory then."
        ),
    ] = None,
    loss: Annotated[LossName | None, typer.Option(help="kl (default): from the teacher; ce: cross-entropy.")] = None,
    train: Annotated[TrainedName | None, typer.Option(help="What is trained: all weights (default) or fewer.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per forward pass and process.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(min=1, help="Forward passes per step.")] = None,
    sequence_length: SequenceLength = None,
    packing: Annotated[
        PackingName | None, typer.Option(help="joined (default): documents in a window see those before them.")
    ] = None,
    validation_data: Annotated[
        str | None, typer.Option(help="Text of the figures; default: sections of --data, held out.")
    ] = None,
    validation_windows: Annotated[int | None, typer.Option(min=1, help="Windows of it.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many validations without a better one.")
    ] = None,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    seed: Seed = None,
    device: Device = DeviceName.auto,
    dtype: Dtype = None,
    threads: Threads = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps per log line.")] = 1,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps per validation and checkpoint.")] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="tensorboard or wandb; may be repeated.")
    ] = None,
    tracker_folder: Annotated[Path, typer.Option(parser=_path, metavar="PATH", help="Where trackers write.")] = Path(
        "runs"
    ),
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train a fused model for a few tokens, taught by its source."""

    def work() -> tuple[dict[str, Any], Any]:
        from headfuse.checkpoint.inputs import check_model
        from headfuse.config.uptrain import load_recipe
        from headfuse.text.documents import check_data

        check_model(model, teacher)
        recipe = load_recipe(config, {"data": data or None, "tokens": tokens, "validation_data": validation_data})
        for text in [*recipe.data, *filter(None, [recipe.validation_data])]:
            check_data(text)
        _prepare(threads, verbose)
        from headfuse.commands import uptrain as command

        document = command.run(
            model=at_revision(model, revision),
            data=data or None, tokens=tokens, config=config, teacher=teacher,
            teacher_device=teacher_device and teacher_device.value, teacher_dtype=teacher_dtype and teacher_dtype.value,
            teacher_cache=teacher_cache, loss=loss and loss.value, train=train and train.value,
            learning_rate=learning_rate, batch_size=batch_size, gradient_accumulation=gradient_accumulation,
            sequence_length=sequence_length, packing=packing and packing.value, validation_data=validation_data,
            validation_windows=validation_windows, patience=patience, output=output, overwrite=overwrite,
            resume=resume, seed=seed, device=device.value, dtype=dtype and dtype.value, threads=threads,
            log_every=log_every, checkpoint_every=checkpoint_every, trackers=tracker or (),
            tracker_folder=tracker_folder, trust_remote_code=trust_remote_code, json_output=json_output, quiet=quiet,
            verbose=verbose,
        )  # fmt: skip
        return document, command.render

    _execute(work, json_output, quiet, verbose)


@app.command()
def export(
    model: Model,
    to: Annotated[TargetName | None, typer.Option(help="Layout of a folder, or one GGUF file for llama.cpp.")] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Renew the model code of a folder, in place, instead.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", parser=_path, metavar="PATH", help="Output folder, or GGUF file.")
    ] = None,
    file_type: Annotated[FileType | None, typer.Option("--type", help="Numbers in a GGUF file; default f16.")] = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write the same model in another layout, without loss; or renew the model code beside its weights."""
    if (to is None) != refresh or (refresh and (output or file_type or overwrite)):
        raise typer.BadParameter("give --to, or --refresh alone")

    def work() -> tuple[dict[str, Any], Any]:
        from headfuse.checkpoint.inputs import check_model

        check_model(model)
        _prepare(None, verbose)
        from headfuse.commands import export as command

        if to is None:
            return command.run_refresh(model), command.render
        document = command.run(
            model=at_revision(model, revision),
            to=to.value, output=output, file_type=file_type and file_type.value, overwrite=overwrite,
            trust_remote_code=trust_remote_code, log=_log(quiet or json_output),
        )  # fmt: skip
        return document, command.render

    _execute(work, json_output, quiet, verbose)


@app.command("eval")
def evaluate(
    model: Model,
    baseline: Annotated[str | None, typer.Option(help="Model to compare with.")] = None,
    gate: Gates = None,
    junit: Junit = None,
    github_summary: Summary = False,
    report: Annotated[
        Path | None, typer.Option(parser=_path, metavar="PATH", help="Write the figures as one HTML file.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness.")] = None,
    tasks_path: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="Local task files; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task; default all.")] = None,
    passkey: Annotated[str | None, typer.Option(metavar="N,N", help="Retrieval test at these context lengths.")] = None,
    passkey_trials: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 10,
    memory: Annotated[
        int | None, typer.Option(parser=_memory, metavar="SIZE", help="What fits into 24GB or 16GiB.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Decode speed against the baseline.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="First compare every file with its checksum.")] = False,
    data: Data = None,
    samples: Samples = 24,
    sequence_length: SequenceLength = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from window to window; default: independent windows.")
    ] = None,
    seed: Seed = None,
    device: Device = DeviceName.auto,
    dtype: Dtype = None,
    threads: Threads = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity, agreement, tasks, retrieval, memory, speed; gates for CI."""

    def work() -> tuple[dict[str, Any], Any]:
        from headfuse.checkpoint.inputs import check_exists, check_model, check_writable
        from headfuse.evaluation.gates import read_gates
        from headfuse.text.documents import check_data

        if gate is not None:
            read_gates(gate)
        check_model(model, baseline)
        check_data("default" if data is None else data)
        for folder in tasks_path or []:
            check_exists(Path(folder), "give the folder of the task files", folder=True)
        check_writable(report, junit)
        names, lengths = _names(tasks, "--tasks"), _lengths(passkey)
        _prepare(threads, verbose)
        from headfuse.commands import eval as command

        document = command.run(
            model=at_revision(model, revision),
            data="default" if data is None else data, baseline=baseline, gate=gate, junit=junit,
            github_summary=github_summary, report=report, verify=verify, samples=samples or 24,
            sequence_length=sequence_length or 512, stride=stride, tasks=names, tasks_path=tasks_path or (),
            limit=limit, passkey=lengths, passkey_trials=passkey_trials, memory=memory, speed=speed,
            seed=seed, device=device.value, dtype=dtype and dtype.value, threads=threads,
            trust_remote_code=trust_remote_code, json_output=json_output, quiet=quiet, verbose=verbose,
        )  # fmt: skip
        return document, command.render

    _execute(work, json_output, quiet, verbose)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Model folder.", show_default=False)],
    figures: Annotated[
        Path | None, typer.Option(parser=_path, metavar="PATH", help="What `headfuse eval --json` printed.")
    ] = None,
    analysis: Annotated[
        Path | None, typer.Option(parser=_path, metavar="PATH", help="What `headfuse analyze -o` wrote, for heat maps.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", parser=_path, metavar="PATH", help="Output file.")] = Path(
        "report.html"
    ),
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write what is known of a fused model as one HTML file."""

    def work() -> tuple[dict[str, Any], Any]:
        from headfuse.checkpoint.inputs import check_exists, check_writable

        check_exists(folder, "give the folder of a model", folder=True)
        check_exists(figures, "write it with `headfuse eval ... --json > FILE`")
        check_exists(analysis, "write it with `headfuse analyze -o FOLDER`", folder=True)
        check_writable(output)
        _prepare(None, verbose)
        from headfuse.commands import report as command

        return command.run(folder=folder, figures=figures, analysis=analysis, output=output), command.render

    _execute(work, json_output, quiet, verbose)


def _overrides(
    budget: str | None,
    method: str | None,
    allocator: str | None,
    grouping: str | None,
    layout: LayoutName | None,
    runtime: Runtime | None,
    preset: PresetName | None,
    data: str | None,
    samples: int | None,
    sequence_length: int | None,
    seed: int | None,
) -> dict[str, Any]:
    from headfuse.plan import LAYOUT_FOR

    wanted = layout.value if layout else None
    if runtime is not None:
        loads = LAYOUT_FOR[runtime.value]
        if wanted and wanted not in loads:
            raise HeadfuseError(
                f"{runtime.value} does not load layout {wanted}", where="--for", fix=f"it loads {', '.join(loads)}"
            )
        wanted = wanted or loads[0]
    return {
        "budget.total": budget,
        "budget.allocator": allocator,
        "method": method,
        "grouping": grouping,
        "layout": wanted,
        "preset": preset.value if preset else None,
        "calibration.data": data,
        "calibration.samples": samples,
        "calibration.sequence_length": sequence_length,
        "seed": seed,
    }


def _log(silent: bool) -> Any:
    from rich.console import Console

    return Console(stderr=True, quiet=silent)


def _execute(work: Callable[[], tuple[dict[str, Any], Any]], as_json: bool, quiet: bool, verbose: bool) -> None:
    """Run a command; print its document; turn every failure into one message and an exit code."""
    first = os.environ.get("RANK", "0") == "0"  # of the processes of `accelerate launch`
    as_json = as_json and first
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        document, render = work()
    except (KeyboardInterrupt, _Terminated) as error:
        what, code = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else ("terminated", 143)
        fix = str(error) or "nothing was written; run it again"
        typer.echo(f"{what}\n  {fix}", err=True)
        if as_json:
            _print_failure(what, None, fix)
        raise typer.Exit(code) from None
    except Exception as error:
        expected = error if isinstance(error, HeadfuseError) else _explained(error)
        unforeseen = verbose and error is not expected
        if not unforeseen:
            typer.echo(f"error: {expected}", err=True)
        if as_json:
            _print_failure(expected.what, expected.where, expected.fix)
        if unforeseen:
            raise
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    if not first:
        return
    if as_json:
        typer.echo(json.dumps(document))
    elif quiet:
        if document.get("output"):
            typer.echo(document["output"])
    else:
        from rich.console import Console

        render(document, Console())
    failed = [gate["gate"] for gate in document.get("gates", []) if not gate["passed"]]
    if failed:
        typer.echo(f"error: gates failed: {', '.join(failed)}", err=True)
        raise typer.Exit(3)


def _print_failure(what: str, where: str | None, fix: str | None) -> None:
    error = {"what": what, "where": where, "fix": fix}
    with contextlib.suppress(
        OSError
    ):  # a full disk behind stdout: the message on stderr tells the failure that matters
        typer.echo(json.dumps({"schema_version": 1, "output": None, "error": error}))


def _explained(error: Exception) -> HeadfuseError:
    """An error that no check foresaw, in the shape of those that were."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return HeadfuseError(error.strerror, where=error.filename, fix="check the path, its permissions and the disk")
    if isinstance(error, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:
        return HeadfuseError(
            f"out of memory: {reason}", fix="give fewer --samples or a smaller --sequence-length, or another --device"
        )
    return HeadfuseError(
        f"unexpected {type(error).__name__}: {reason}",
        fix="this is a fault of headfuse: run again with --verbose and report the traceback",
    )


class _Terminated(BaseException):
    """SIGTERM, so that cleaning up runs as it does for Ctrl-C."""


def _terminated(number: int, frame: object) -> None:
    raise _Terminated


def _prepare(threads: int | None, verbose: bool) -> None:
    """Before the heavy imports, after what needs none of them."""
    if threads:
        import torch

        torch.set_num_threads(threads)
    _calm_libraries(verbose)


def _calm_libraries(verbose: bool) -> None:
    """Keep the libraries' own chatter and bars off stderr unless asked for."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        return
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    """Entry point of the `headfuse` command."""
    code: Any = 0
    try:
        try:
            app()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
    except OSError as error:  # commands turn every other one into a message
        code = code or 1
        _forget_stdout(error)
    sys.exit(code)


def _forget_stdout(error: OSError) -> None:
    """Say that stdout cannot be written, but to a reader that went away; what it still holds goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if error.errno != errno.EPIPE:
        with contextlib.suppress(OSError):
            typer.echo(
                f"error: standard output cannot be written: {error.strerror}\n  free the disk behind it", err=True
            )


if __name__ == "__main__":
    main()
