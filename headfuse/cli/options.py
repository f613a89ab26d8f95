"""Options shared by several commands, grouped as in `--help`, and the values given on the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from headfuse import choices
from headfuse.config.presets import PRESETS

PANELS = KEEP, HOW, TEXT, OUTPUT, MACHINE, CI, PRINT = "Keep", "How", "Text", "Output", "Machine", "CI", "Print"
"""The groups of `--help`."""

T = TypeVar("T")


def given(ctx: typer.Context, names: Collection[str]) -> dict[str, Any]:
    """The options of these names that are on the command line; the config decides the others."""

    def is_given(name: str) -> bool:
        source = ctx.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    return {name: value for name, value in ctx.params.items() if name in names and is_given(name)}


def usage(parse: Callable[[str], T], text: str) -> T:
    """Parse a value as a user writes it; a value that the parser refuses is a usage error."""
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def path(text: str) -> Path:
    """A path; an empty one is a usage error."""
    if not text:  # Path("") would be the working directory: an unset variable of a script
        raise typer.BadParameter("the name is empty")
    return Path(text)


def one_of(choice: Any) -> str:
    """The names that an option takes, as `--help` shows them: spaces let a narrow terminal break between them."""
    return " | ".join(choices.names(choice))


def _budget(text: str) -> str:
    from headfuse.config.values import parse_budget

    usage(parse_budget, text)
    return text.strip()


def _part(text: str) -> float:
    from headfuse.config.values import parse_part

    return usage(parse_part, text)


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
        help="Share of the source's KV cache to keep, such as 0.25 or 1/4.",
        rich_help_panel=KEEP,
    ),
]
Layout = Annotated[
    choices.Layout | None,
    typer.Option(
        metavar=one_of(choices.Layout),
        help="Format of the output; default: latent, or decoupled where latent does not fit; see --for.",
        rich_help_panel=KEEP,
    ),
]
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
CrossLayer = Annotated[
    int | None,
    typer.Option(
        "--cross-layer",
        min=1,
        metavar="LAYERS",
        help="Layout latent: layers before it whose cache a layer reads, too; the same bytes, less loss.",
        rich_help_panel=KEEP,
    ),
]
MaxPositions = Annotated[
    int | None,
    typer.Option(
        "--max-positions",
        min=1,
        metavar="TOKENS",
        help="Layout latent: longest text that the fused model is for; fewer than the source's lose less.",
        rich_help_panel=KEEP,
    ),
]
For = Annotated[
    choices.Runtime | None,
    typer.Option(
        "--for",
        metavar=one_of(choices.Runtime),
        help="Choose a layout that this runtime loads.",
        rich_help_panel=KEEP,
    ),
]

# These three stay text: the config names the near one of a misspelt name.
Method = Annotated[
    str | None,
    typer.Option(
        help="How heads are fused: subspace (default), align, mean, first, or dha, which trains.", rich_help_panel=HOW
    ),
]
Allocator = Annotated[
    str | None,
    typer.Option(
        help="How the budget is divided: auto (default; with layout latent the best one of sensitivity, shrinkage and "
        "uniform), sensitivity, shrinkage, taylor, shapley, dha-greedy or uniform.",
        rich_help_panel=HOW,
    ),
]
Grouping = Annotated[
    str | None,
    typer.Option(help="Which heads are fused together: cluster (default), neighbours or anneal.", rich_help_panel=HOW),
]
Preset = Annotated[
    choices.Preset | None,
    typer.Option(
        metavar=one_of(choices.Preset),
        help="; ".join(f"{name}: {preset.cost}" for name, preset in PRESETS.items()) + ".",
        rich_help_panel=HOW,
    ),
]
Config = Annotated[
    str | None,
    typer.Option("--config", "-c", help="YAML file of options, or the name of a packaged one.", rich_help_panel=HOW),
]
Seed = Annotated[int | None, typer.Option(metavar="N", min=0, help="Seed of every random choice.", rich_help_panel=HOW)]

Data = Annotated[
    str | None,
    typer.Option(
        help="Text or chats: a .txt, .jsonl, .csv or .parquet file, a folder, or the id of a hub dataset.",
        rich_help_panel=TEXT,
    ),
]
Samples = Annotated[int | None, typer.Option(min=2, help="Number of windows of text.", rich_help_panel=TEXT)]
SequenceLength = Annotated[int | None, typer.Option(min=8, help="Tokens in a window.", rich_help_panel=TEXT)]
RandomTokens = Annotated[
    float | None,
    typer.Option(
        "--random-tokens",
        parser=_part,
        metavar="SHARE",
        help="Share of windows of random tokens beside the text, for languages that it lacks; by default a quarter "
        "beside the bundled text, none beside your own.",
        rich_help_panel=TEXT,
    ),
]

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", parser=path, metavar="PATH", help="Output folder.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if it exists.", rich_help_panel=OUTPUT)
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=OUTPUT)]

Device = Annotated[
    choices.Device,
    typer.Option(metavar=one_of(choices.Device), help="Device to compute on.", rich_help_panel=MACHINE),
]
Placement = Annotated[
    choices.Placement,
    typer.Option(
        metavar=one_of(choices.Placement),
        help="Weights that stay on the device between uses; auto: as many as fit.",
        rich_help_panel=MACHINE,
    ),
]
ComputeDtype = Annotated[
    choices.ComputeDtype,
    typer.Option(
        metavar=one_of(choices.ComputeDtype),
        help="Dtype of products in layers; headfuse doctor shows how fast each is.",
        rich_help_panel=MACHINE,
    ),
]
WrittenDtype = Annotated[
    choices.Dtype | None,
    typer.Option(
        metavar=one_of(choices.Dtype),
        help="Dtype of the written weights; by default that of the source.",
        rich_help_panel=MACHINE,
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Number of CPU threads.", rich_help_panel=MACHINE)]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=MACHINE),
]

Gates = Annotated[
    str | None,
    typer.Option(
        metavar="GATES",
        help="Limits such as ppl_ratio<=1.1, or a YAML file of them. Exit code 3 if one is exceeded.",
        rich_help_panel=CI,
    ),
]
Junit = Annotated[
    Path | None,
    typer.Option(parser=path, metavar="PATH", help="Write the results of the gates as JUnit XML.", rich_help_panel=CI),
]
Summary = Annotated[
    bool,
    typer.Option("--github-summary", help="Add the results to the summary page of the GitHub job.", rich_help_panel=CI),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=PRINT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the output path.", rich_help_panel=PRINT)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More output; show tracebacks.", rich_help_panel=PRINT)]
