"""Options that several commands have, grouped as `--help` shows them, and what the command line gave."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from headfuse import choices
from headfuse.config.presets import PRESETS
from headfuse.errors import ConfigError

KEEP, HOW, TEXT, OUTPUT, MACHINE, CI, PRINT = "Keep", "How", "Text", "Output", "Machine", "CI", "Print"
"""The groups of `--help`."""

T = TypeVar("T")


def given(ctx: typer.Context, names: Collection[str]) -> dict[str, Any]:
    """The options of these names that the command line holds; for the others the config decides."""

    def is_given(name: str) -> bool:
        source = ctx.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    return {name: value for name, value in ctx.params.items() if name in names and is_given(name)}


def usage(parse: Callable[[str], T], text: str) -> T:
    """A value as a user writes it; what the parser refuses is a usage error."""
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def path(text: str) -> Path:
    """A path; an empty one is a usage error."""
    if not text:  # Path("") would be the working directory: an unset variable of a script
        raise typer.BadParameter("the name is empty")
    return Path(text)


def _budget(text: str) -> str:
    from headfuse.config.values import parse_budget

    usage(parse_budget, text)
    return text.strip()


def _head_dim(text: str) -> str:
    from headfuse.config.values import parse_head_dim

    usage(parse_head_dim, text)
    return text.strip()


Model = Annotated[str, typer.Argument(help="Model folder or hub id: org/name, org/name@revision.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=MACHINE)]

Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        parser=_budget,
        metavar="SHARE",
        help="Kept KV bytes over the source's: 0.25 or 1/4.",
        rich_help_panel=KEEP,
    ),
]
Layout = Annotated[choices.Layout | None, typer.Option(help="How the result lies on disk.", rich_help_panel=KEEP)]
HeadDim = Annotated[
    str | None,
    typer.Option(
        "--head-dim",
        parser=_head_dim,
        metavar="CHANNELS",
        help="Width of the heads of layout gqa, or auto: fewer, wider heads at the same bytes.",
        rich_help_panel=KEEP,
    ),
]
For = Annotated[
    choices.Runtime | None,
    typer.Option("--for", help="Pick the layout that this runtime loads.", rich_help_panel=KEEP),
]

# These three stay text: the config names the near one of a misspelt name.
Method = Annotated[
    str | None, typer.Option(help="subspace (default), align, mean, first; dha trains.", rich_help_panel=HOW)
]
Allocator = Annotated[
    str | None,
    typer.Option(help="sensitivity (default), taylor, shapley, dha-greedy or uniform.", rich_help_panel=HOW),
]
Grouping = Annotated[str | None, typer.Option(help="cluster (default), neighbours or anneal.", rich_help_panel=HOW)]
Preset = Annotated[
    choices.Preset | None,
    typer.Option(
        help="; ".join(f"{name}: {preset.cost}" for name, preset in PRESETS.items()) + ".", rich_help_panel=HOW
    ),
]
Config = Annotated[
    str | None,
    typer.Option("--config", "-c", help="YAML file or the name of a packaged config.", rich_help_panel=HOW),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed.", rich_help_panel=HOW)]

Data = Annotated[
    str | None,
    typer.Option(
        help="Text or chats: .txt, .jsonl, .csv, .parquet, a folder, or a hub dataset id.", rich_help_panel=TEXT
    ),
]
Samples = Annotated[int | None, typer.Option(min=2, help="Windows of text.", rich_help_panel=TEXT)]
SequenceLength = Annotated[int | None, typer.Option(min=8, help="Tokens per window.", rich_help_panel=TEXT)]

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", parser=path, metavar="PATH", help="Output folder.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=OUTPUT)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=OUTPUT)]

Device = Annotated[choices.Device, typer.Option(help="Where to compute.", rich_help_panel=MACHINE)]
Placement = Annotated[
    choices.Placement,
    typer.Option(help="What stays on a device between two uses; auto: what its memory holds.", rich_help_panel=MACHINE),
]
WrittenDtype = Annotated[
    choices.Dtype | None,
    typer.Option(help="Dtype of the written weights; default the source's.", rich_help_panel=MACHINE),
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.", rich_help_panel=MACHINE)]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the source's own code.", rich_help_panel=MACHINE)
]

Gates = Annotated[
    str | None,
    typer.Option(
        metavar="GATES", help="Limits to keep, or a YAML file of them; exit code 3 if not.", rich_help_panel=CI
    ),
]
Junit = Annotated[
    Path | None,
    typer.Option(parser=path, metavar="PATH", help="Write the gates' verdicts as JUnit XML.", rich_help_panel=CI),
]
Summary = Annotated[
    bool, typer.Option("--github-summary", help="Add them to the GitHub job's summary page.", rich_help_panel=CI)
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=PRINT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the output path.", rich_help_panel=PRINT)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say more; tracebacks of unexpected errors.", rich_help_panel=PRINT)
]


def layout_for(runtime: choices.Runtime | None, layout: choices.Layout | None) -> choices.Layout | None:
    """The layout that `--layout` names or `--for` picks.

    Raises:
        ConfigError: where the runtime does not load the layout.
    """
    if runtime is None:
        return layout
    from headfuse.plan import LAYOUT_FOR

    loads = LAYOUT_FOR[runtime]
    if layout is not None and layout not in loads:
        raise ConfigError(f"{runtime} does not load layout {layout}", where="--for", fix=f"it loads {', '.join(loads)}")
    return layout or loads[0]
