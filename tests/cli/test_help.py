"""Help, completion, and names of options and values that are nearly right."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from headfuse import choices
from headfuse.cli.app import COMMANDS, app
from headfuse.cli.say import say
from headfuse.reporting.progress import stages
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_whose_options_exist(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "120"})
    example = COMMANDS[name][1]
    assert f"Example: {example}" in result.output
    program, command, *words = shlex.split(example)
    assert (program, command) == ("headfuse", name)
    parsed = CliRunner().invoke(app, [name, *words, "--help"])
    assert parsed.exit_code == 0, parsed.output
    assert [word for word in words if word.startswith("--") and word not in result.output] == []


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["fuse", "m", "--budgte", "1/4"], "Did you mean --budget?"),
        (["eval", "m", "--sampels", "3"], "Did you mean --samples?"),
        (["fuse", "m", "--layout", "gqaa"], "Did you mean 'gqa'?"),
        (["fuse", "m", "--for", "vlm"], "Did you mean 'vllm'?"),
        (["fsue", "m"], "Did you mean 'fuse'?"),
    ],
)
def test_the_near_name_is_given(words: list[str], near: str) -> None:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 2
    what = json.loads(result.stdout)["error"]["what"]
    assert near in what
    assert "Value error" not in what


def test_completion_offers_options_and_commands() -> None:
    words = {"COMP_WORDS": "headfuse fuse --bud", "COMP_CWORD": "2", "_HEADFUSE_COMPLETE": "complete_bash"}
    environment = {**os.environ, **words}
    command = [sys.executable, "-c", "from headfuse.cli.app import app; app(prog_name='headfuse')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["--budget"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `fuse` prints on several kinds of terminal."""
    folder = tmp_path_factory.mktemp("shown")
    model = tiny_model(folder / "model")
    text = ("--data", folder / "text.txt", "--samples", 8, "--sequence-length", 32, "--preset", "fast")
    printed = {"plain": run("fuse", model, "-o", folder / "out[red]", *text)}
    for name, variables in {"dumb": {"TERM": "dumb"}, "no colour": {"NO_COLOR": "1", "COLUMNS": "80"}}.items():
        command = [sys.executable, "-m", "headfuse", "fuse", model, "-o", folder / name, *text]
        environment = {**os.environ, **variables}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
        printed[name] = done.stdout + done.stderr
    return printed


@pytest.mark.long
def test_fuse_ends_with_sizes_runtimes_and_the_next_commands(shown: dict[str, str]) -> None:
    end = shown["plain"]
    for row in ("KV bytes per token", "weights, bytes", "parameters", "NLL, held-out calibration text"):
        assert row in end
    assert "out[red]\nloads in transformers" in end
    last = [line.split()[:2] for line in end.splitlines()[-2:]]
    assert last == [["headfuse", "eval"], ["headfuse", "uptrain"]]


@pytest.mark.long
@pytest.mark.parametrize("terminal", ["dumb", "no colour"])
def test_plain_terminals_get_plain_text(shown: dict[str, str], terminal: str) -> None:
    assert "\x1b[" not in shown[terminal]
    assert max(map(len, shown[terminal].split("wrote")[0].splitlines())) <= 110


def test_the_document_of_fuse_counts_stored_weights(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    document = fuse(model, tmp_path / "out", "--preset", "fast")
    before, after = document["parameters"]["before"], document["parameters"]["after"]
    assert after < before
    assert document["weight_bytes"]["after"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert document["weight_bytes"]["before"] == (model / "model.safetensors").stat().st_size


NAMED = {
    "--layout": choices.Layout, "--for": choices.Runtime, "--dtype": choices.Dtype, "--placement": choices.Placement,
    "--teacher-dtype": choices.Dtype, "--to": choices.Target,
}  # fmt: skip
"""Options whose names are too long for the column that 80 columns leave them, and what they take."""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_eighty_columns_without_cutting_a_word(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).output
    assert "…" not in shown
    for parameter in typer.main.get_command(app).commands[name].params:  # type: ignore[attr-defined]
        words = [option for option in parameter.opts if option.startswith("--")]
        words += choices.names(NAMED.get(words[0])) if words else ()
        assert [word for word in words if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", shown)] == []


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def _said(text: str, terminal: bool) -> str:
    file = _Screen() if terminal else io.StringIO()
    say(Console(file=file, width=40, force_terminal=True, markup=False, color_system=None), text)
    return file.getvalue()


def test_a_terminal_breaks_sentences_between_words_and_leaves_paths_whole() -> None:
    path = "/a/folder/whose/name/is/wider/than/the/whole/terminal-is"
    lines = _said(f"  loads in transformers, vLLM and llama.cpp, from {path}", terminal=True).splitlines()
    assert lines == ["  loads in transformers, vLLM and", "  llama.cpp, from", f"  {path}"]


def test_a_log_in_colour_has_a_line_for_each_stage() -> None:
    """FORCE_COLOR, which many CI jobs set, makes rich take a log for a terminal."""
    file = io.StringIO()
    with stages(Console(file=file, force_terminal=True), "reading") as show:
        show("fuse", "1 of 2", 0.5)
    assert file.getvalue() == "reading (0:00)\nfuse: 1 of 2 (0:00)\n"


def test_a_log_keeps_a_sentence_on_one_line() -> None:
    text = "a sentence that is longer than the forty columns of this console"
    assert _said(text, terminal=False) == text + "\n"


def test_fuse_for_llama_cpp_names_the_export(tmp_path: Path) -> None:
    """llama.cpp loads a file that `fuse` does not write."""
    document = fuse(tiny_model(tmp_path / "model"), tmp_path / "out", "--for", "llama.cpp", "--preset", "fast")
    assert document["next"][-1] == f"headfuse export {tmp_path / 'out'} --to gguf --output {tmp_path / 'out'}.gguf"
    assert "after `headfuse export --to gguf`" in document["loads_in"]
