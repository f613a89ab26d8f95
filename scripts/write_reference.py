"""Writes docs/reference/commands.md and options.md from the code: `python scripts/write_reference.py`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo

from headfuse.cli.app import COMMANDS
from headfuse.cli.options import PANELS
from headfuse.config.evaluate import EvalConfig
from headfuse.config.fuse import FuseConfig
from headfuse.config.loading import Options
from headfuse.config.packaged import packaged
from headfuse.config.uptrain import UptrainConfig

FOLDER = Path(__file__).parents[1] / "docs/reference"
WRITTEN = "<!-- Written by `python scripts/write_reference.py` from the code. Change the code, not this page. -->"
SECTIONS: tuple[tuple[str, type[Options], str, dict[str, str]], ...] = (
    ("fuse and analyze", FuseConfig, "", {}),
    ("uptrain", UptrainConfig, "recipes", {"data": "{corpus.jsonl: 1.0}", "tokens": "50M"}),
    ("eval", EvalConfig, "evaluations", {}),
)
"""Heading, options, folder of packaged files, and examples of options without a default."""


def commands_page() -> str:
    """Every command with its options, in the groups of `--help`."""
    lines = [
        "# Commands", WRITTEN, "",
        "`headfuse COMMAND --help` shows the same. The exit code is 0 when the work is done, 1 after a failure with",
        "one message, 2 for a usage error, 3 when a gate failed, 130 after Ctrl-C, and 143 after SIGTERM.",
    ]  # fmt: skip
    for name, (command, example) in COMMANDS.items():
        lines += ["", f"## {name}", inspect.cleandoc(command.__doc__ or ""), "", "```bash", example, "```"]
        rows = [_row(*each) for each in _parameters(command)]
        for panel in (None, *PANELS):
            own = [row for group, row in rows if group == panel]
            head = [f"**{panel or 'Arguments'}**", "", "| option | default | meaning |", "|---|---|---|"]
            lines += ["", *head, *own] if own else []
    return "\n".join(lines) + "\n"


def _parameters(command: Callable[..., None]) -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, type, what Typer knows, and default of every parameter."""
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if get_origin(hints[name]) is Annotated:
            kind, info = get_args(hints[name])[:2]
            yield name, kind, info, parameter.default


def _row(name: str, kind: Any, info: Any, default: Any) -> tuple[str | None, str]:
    """The group of a parameter, and its line of the table."""
    argument = isinstance(info, ArgumentInfo)
    declared = [each for each in (info.default, *(info.param_decls or ())) if str(each).startswith("-")]
    names = [name.upper()] if argument else declared or [f"--{name.replace('_', '-')}"]
    choices = [get_args(each) for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
    meaning = [info.help, *(", ".join(f"`{choice}`" for choice in each) + "." for each in choices[:1])]
    shown = "" if default in (None, False, inspect.Parameter.empty) else f"`{default}`"
    return info.rich_help_panel, f"| {', '.join(f'`{each}`' for each in names)} | {shown} | {' '.join(meaning)} |"


def options_page() -> str:
    """Every key of the YAML files, with its default."""
    lines = [
        "# Options in YAML", WRITTEN, "",
        "`--config` takes a YAML file, or the name of a packaged one. Options on the command line win over it. Python",
        "takes the same names as keyword arguments. Below, every key has its default.",
    ]  # fmt: skip
    for heading, options, folder, examples in SECTIONS:
        names = ", ".join(f"`{name}`" for name in sorted(packaged(folder)))
        lines += ["", f"## {heading}"]
        lines += [f"Packaged files: {names}.", ""] if names else []
        lines += ["```yaml", *_yaml(options, examples), "```"]
    return "\n".join(lines) + "\n"


def _yaml(options: type[Options], examples: dict[str, str], indent: str = "") -> Iterator[str]:
    """The keys of some options with their defaults, each below its description."""
    for name, field in options.model_fields.items():
        yield f"{indent}# {' '.join((field.description or '').split())}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Options):
            yield f"{indent}{name}:"
            yield from _yaml(inner, {}, indent + "  ")
        else:
            yield f"{indent}{name}: {examples[name] if field.is_required() else _plain(field)}"


def _plain(field: FieldInfo) -> str:
    """A default as YAML has it."""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return value if isinstance(value, str) else json.dumps(value)


def main() -> None:
    """Write both pages."""
    (FOLDER / "commands.md").write_text(commands_page(), encoding="utf-8")
    (FOLDER / "options.md").write_text(options_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
