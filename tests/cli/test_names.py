"""An option has one name in YAML, on the command line and in Python, and one list of what it takes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from typer.testing import CliRunner

import headfuse
from headfuse import choices
from headfuse.checkpoint.reader import DTYPE_NAMES
from headfuse.choices import LAYOUT_FOR
from headfuse.cli.app import app
from headfuse.config.command import ANALYZE, EVALUATE, FUSE, UPTRAIN, Command
from headfuse.config.presets import PRESETS
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS
from headfuse.layouts.gguf.writer import TYPES
from headfuse.planning.allocators import ALLOCATORS
from headfuse.planning.grouping import GROUPERS
from tests.support.commands import run
from tests.support.tiny_models import tiny_model

COMMANDS: dict[str, tuple[str, Command[Any, Any]]] = {
    "analyze": ("analyze", ANALYZE),
    "fuse": ("fuse", FUSE),
    "uptrain": ("uptrain", UPTRAIN),
    "eval": ("evaluate", EVALUATE),
}
PRINT = {"json_output", "quiet", "verbose", "revision"}
"""A hub id in Python carries its revision: `org/name@revision`."""
CI = {"gate", "junit", "github_summary"}
LINE_ALONE = {
    "analyze": {*PRINT, "runtime", "output", "overwrite"},
    "fuse": {*PRINT, *CI, "runtime", "dry_run"},
    "uptrain": PRINT,
    "eval": {*PRINT, *CI, "report", "verify"},
}
"""What the command does around the function's work; `--for` picks a layout."""
YAML_ALONE = {
    "analyze": {"calibration", "dha"},
    "fuse": {"calibration", "dha"},
    "uptrain": {
        "cross_entropy", "hidden", "layerwise", "lora_rank", "lora_alpha", "fused_learning_rate", "warmup",
        "final_learning_rate", "ema_decay", "weight_decay", "gradient_clip", "gradient_checkpointing",
    },
    "eval": set(),
}  # fmt: skip
"""Sections, and what few runs change: Python takes these by name, too, and the command line in a file."""
PYTHON_ALONE = {
    "analyze": {"on_progress"},
    "fuse": {"on_progress"},
    "uptrain": {"on_progress"},
    "eval": {"on_stage"},
}


def line(name: str) -> dict[str, Any]:
    """The parameters of a command, by name."""
    command: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in command.commands[name].params}


def python(function: str, command: Command[Any, Any]) -> set[str]:
    """The arguments that a function takes by keyword."""
    own = set(inspect.signature(getattr(headfuse, function)).parameters) - {"options"}
    return own | set(command.names)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_one_name(name: str) -> None:
    function, command = COMMANDS[name]
    on_the_line, in_python = set(line(name)), python(function, command)
    assert on_the_line - in_python == LINE_ALONE[name]
    assert in_python - on_the_line == YAML_ALONE[name] | PYTHON_ALONE[name]
    in_yaml = set(command.options.model_fields)
    assert in_yaml - in_python == set()
    assert in_yaml - on_the_line == YAML_ALONE[name]
    for dotted in command.short.values():
        section, key = dotted.split(".")
        assert key in command.options.model_fields[section].annotation.model_fields


@pytest.mark.parametrize("name", COMMANDS)
def test_misspelt_arguments_are_looked_up_among_all(name: str) -> None:
    function, command = COMMANDS[name]
    own = inspect.signature(getattr(headfuse, function)).parameters
    assert set(own) - {"model", "options"} == set(command.arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_default_that_help_shows_is_that_of_the_config(name: str) -> None:
    _, command = COMMANDS[name]
    fields = command.options.model_fields | command.machine.model_fields
    shown = {option: parameter.default for option, parameter in line(name).items() if option in fields}
    for option, default in shown.items():
        assert default is None or default == fields[option].default, option


@pytest.mark.parametrize("name", ["export", "report"])
def test_export_and_report_take_the_options_of_their_commands(name: str) -> None:
    own = set(inspect.signature(getattr(headfuse, name)).parameters)
    assert set(line(name)) - own == ({*PRINT, "refresh"} if name == "export" else PRINT - {"revision"})
    assert own - set(line(name)) == set()


@pytest.mark.parametrize(
    ("table", "choice"),
    [
        (FUSION_METHODS, choices.Method), (ALLOCATORS, choices.Allocator), (GROUPERS, choices.Grouping),
        (LAYOUTS, choices.Layout), (PRESETS, choices.Preset), (LAYOUT_FOR, choices.Runtime),
        (DTYPE_NAMES, choices.Dtype), (TYPES, choices.FileType),
    ],
    ids=["methods", "allocators", "groupers", "layouts", "presets", "runtimes", "dtypes", "gguf"],
)  # fmt: skip
def test_tables_hold_the_names_that_their_options_take(table: dict[str, object], choice: Any) -> None:
    assert set(table) == set(get_args(choice))


def test_help_is_grouped() -> None:
    shown = CliRunner().invoke(app, ["fuse", "--help"], env={"COLUMNS": "200"}).output
    places = [shown.index(f"─ {panel} ─") for panel in ("Keep", "How", "Text", "Output", "Machine", "CI", "Print")]
    assert places == sorted(places)


def test_the_command_line_wins_over_a_file_and_its_defaults_do_not(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    (tmp_path / "eval.yaml").write_text(f"data: {tmp_path / 'text.txt'}\nsamples: 3\nsequence_length: 16\nseed: 5\n")
    command = ["eval", model, "--config", tmp_path / "eval.yaml", "--sequence-length", 32, "--json"]
    document = json.loads(run(*command).splitlines()[-1])
    assert (document["windows"], document["sequence_length"], document["seed"]) == (3, 32, 5)
