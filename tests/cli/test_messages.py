"""What a user reads where something cannot be used, where a log is no terminal, and where stdout cannot be written."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from headfuse.cli.app import app
from headfuse.cli.eval import render
from headfuse.reporting import progress
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    tiny_model(folder / "model")
    fuse(folder / "model", folder / "fused", "--budget", 0.5, "--preset", "fast")
    return folder


def headfuse(*args: str | bytes, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    line = [sys.executable, "-m", "headfuse", *args]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.run(line, check=False, **options)


def test_verbose_shows_the_log_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Of the package alone, on stderr; without it, warnings only."""
    model, text = tiny_model(tmp_path / "model"), str(tmp_path / "text.txt")
    line = [
        "fuse",
        str(model),
        "--data",
        text,
        "--samples",
        "2",
        "--sequence-length",
        "16",
        "--preset",
        "fast",
        "--quiet",
    ]
    for number, more in enumerate(([], ["--verbose"], [])):
        result = CliRunner().invoke(app, [*line, "--output", str(tmp_path / f"out-{number}"), *more])
        assert result.exit_code == 0
        assert ("calibration windows" in result.stderr) == bool(more)
        assert "calibration windows" not in result.stdout


def test_bad_input_is_refused_before_torch_is_imported(folder: Path) -> None:
    """One process runs every line: torch would stay imported after the first that needs it."""
    model, missing = str(folder / "model"), str(folder / "missing")
    (folder / "bad.yaml").write_text("budget: {totl: 0.5}")
    (folder / "no.yaml").write_text("a: [")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    lines: list[tuple[int, list[str]]] = [(2, ["fuse", model, "--budget", "3x"])]
    for bad in ("nosuch", missing, "", str(folder / "empty"), str(folder / "broken"), str(folder / "bad.yaml")):
        lines += [(1, [command, bad]) for command in ("fuse", "analyze", "eval")]
        lines += [(1, ["uptrain", bad, "--tokens", "9", "--data", "default"]), (1, ["export", bad, "--to", "gqa"])]
    lines += [
        (1, ["uptrain", model, "--teacher", missing, "--tokens", "9", "--data", "default"]),
        (1, ["uptrain", model, "--tokens", "9", "--data", missing]),
        (1, ["uptrain", model, "--config", "no-recipe"]),
        (1, ["eval", model, "--baseline", missing]),
        (1, ["eval", model, "--gate", "perplexty<=3"]),
        (1, ["eval", model, "--gate", missing]),
        (1, ["eval", model, "--gate", ""]),
        (1, ["fuse", model, "--gate", " , "]),
        (1, ["eval", model, "--tasks", ""]),
        (1, ["eval", model, "--passkey", ""]),
        (1, ["eval", model, "--report", str(folder)]),
        (1, ["eval", model, "--junit", f"{missing}/junit.xml"]),
        (1, ["fuse", model, "--junit", f"{missing}/junit.xml"]),
        (1, ["report", model, "-o", str(folder)]),
        (1, ["eval", model, "--data", missing]),
        (1, ["eval", model, "--tasks", "x", "--tasks-path", missing]),
        (1, ["eval", model, "--passkey", "x"]),
        (1, ["fuse", model, "--plan", missing]),
        (1, ["fuse", model, "--data", missing]),
        (1, ["fuse", model, "--for", "sglang", "--layout", "decoupled"]),
        (1, ["report", missing]),
        (1, ["report", model, "--figures", missing]),
    ]
    for config in ("headfuse-26", str(folder / "bad.yaml"), str(folder / "no.yaml"), str(folder / "empty")):
        lines += [(1, [command, model, "--config", config]) for command in ("fuse", "analyze")]
    script = f"""
import sys
from headfuse.cli.app import app
for code, line in {lines!r}:
    try:
        app(line)
    except SystemExit as end:
        assert end.code == code, (line, end.code)
    heavy = {{"torch", "transformers", "datasets"}} & sys.modules.keys()
    assert not heavy, (line, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(lines) - 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--buget", "0.5"), "--budget"), (("--samples", "0"), "2"), (("--seed", "-1"), "0"), (("--threads", "0"), "1"),
        (("--sequence-length", "x"), "integer"), (("-o", ""), "the name is empty"),
    ],
)  # fmt: skip
def test_usage_errors_name_the_option_and_what_it_takes(option: tuple[str, str], expected: str) -> None:
    result = CliRunner().invoke(app, ["fuse", "model", *option, "--json"])
    assert result.exit_code == 2
    what = json.loads(result.stdout)["error"]["what"]
    assert "Input should" not in result.output
    assert option[0] in what
    assert expected in what


@pytest.mark.parametrize("command", ["fuse", "report"])
def test_arguments_that_are_not_utf8_are_named_as_such(command: str) -> None:
    done = headfuse(command, b"mod\xff", "--json")
    assert done.returncode == 2
    assert r"b'mod\xff' is not UTF-8" in json.loads(done.stdout)["error"]["what"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_named_as_one(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    text = ("--data", folder / "text.txt", "--samples", 4, "--sequence-length", 32)
    message = run("fuse", tmp_path / "model", "-o", tmp_path / "out", *text, code=1)
    assert f"{name}: is a Git LFS pointer" in message
    assert "git lfs pull" in message


# ---------------------------------------------------------------- stdout that cannot be written


OUTPUTS = (["--help"], ["--version"], ["report", "FUSED", "-o", "OUT", "--json"])


def in_folder(args: list[str], folder: Path, out: Path) -> list[str]:
    return [{"FUSED": str(folder / "fused"), "OUT": str(out / "r.html")}.get(arg, arg) for arg in args]


@pytest.mark.parametrize("args", OUTPUTS, ids=" ".join)
def test_a_full_disk_behind_stdout_is_one_message(folder: Path, tmp_path: Path, args: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("w") as full:
        done = headfuse(*in_folder(args, folder, tmp_path), stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output cannot be written: No space left on device\n")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("args", OUTPUTS, ids=" ".join)
def test_a_closed_pipe_ends_in_silence(folder: Path, tmp_path: Path, args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = headfuse(*in_folder(args, folder, tmp_path), stdout=write)
    os.close(write)
    assert done.returncode == 1
    assert not done.stderr


def test_a_failure_keeps_its_message_where_stdout_is_full() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("w") as full:
        done = headfuse("fuse", "nosuch", "--json", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: nosuch: no such folder\n")
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- logs, tables, documents


def console(**options: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, **{"width": 80, **options}), stream


def test_a_log_has_a_line_for_each_stage_and_one_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    log, stream = console()
    with progress.stages(log, "reading") as report:
        for done in range(1, 31):
            report("survey", f"layer {done} of 30")
        report("fuse", "1 of 30")
    assert stream.getvalue().splitlines() == [
        "reading (0:00)", "survey: layer 1 of 30 (0:00)", "fuse: 1 of 30 (0:00)",
    ]  # fmt: skip
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.1)
    log, stream = console()
    with progress.stages(log, "reading") as report:
        report("survey", "layer 7 of 30")
        time.sleep(0.5)
    assert 3 <= stream.getvalue().count("survey: layer 7 of 30") <= 7
    log, stream = console(quiet=True)
    with progress.stages(log, "reading"):
        time.sleep(0.2)
    assert not stream.getvalue()


def test_stages_are_on_stderr_of_every_command_that_takes_long(folder: Path, tmp_path: Path) -> None:
    text = ("--data", str(folder / "text.txt"), "--samples", "8", "--sequence-length", "32")
    fused = ["fuse", str(folder / "model"), "-o", str(tmp_path / "out"), "--preset", "fast", *text]
    result = CliRunner().invoke(app, fused)
    assert [line.split(":")[0].split(" (")[0] for line in result.stderr.splitlines()] == ["reading", "survey", "fuse"]
    quiet = CliRunner().invoke(app, [*fused, "--overwrite", "-q"])
    assert not quiet.stderr
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "out"), *text])
    assert "evaluating out (0:0" in result.stderr
    trained = ["uptrain", str(tmp_path / "out"), "--data", text[1], "--tokens", "256", "--sequence-length", "32"]
    result = CliRunner().invoke(app, [*trained, "--loss", "ce", "-o", str(tmp_path / "trained")])
    assert result.exit_code == 0, result.output
    assert "training: step 1 of " in result.stderr


def test_the_columns_of_eval_can_be_told_apart(folder: Path, tmp_path: Path) -> None:
    text = ("--data", folder / "text.txt", "--samples", 4, "--sequence-length", 32)
    document = json.loads(run("eval", folder / "fused", "--baseline", folder / "model", *text, "--json"))
    for name in ("model", "a-name-that-is-much-longer-than-any-figure-of-a-model-and-has-no-end"):
        document["model"]["name"] = document["baseline"]["name"] = name
        out, stream = console()
        render(document, out)
        head = stream.getvalue().splitlines()[1]
        assert [cell.strip() for cell in head.strip("┃").split("┃")][1:3] == ["model", "baseline"]
        figure = f"{document['model']['nll']:.4f} ± {document['model']['nll_stderr']:.4f}"
        assert figure in stream.getvalue()


def test_a_report_says_what_is_kept(folder: Path, tmp_path: Path) -> None:
    document = json.loads(run("report", folder / "fused", "-o", tmp_path / "r.html", "--json"))
    assert document["kv_ratio"] == 0.5


def test_a_teacher_that_is_not_the_source_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny_model(tmp_path / "other", kv_heads=2)
    line = ["uptrain", folder / "fused", "--data", folder / "text.txt", "--tokens", 64, "--sequence-length", 32]
    run(*line, "--teacher", folder / "model", "-o", tmp_path / "same")
    assert "is not the source" not in caplog.text
    run(*line, "--teacher", other, "-o", tmp_path / "out")
    assert "the teacher other is not the source named in plan.json, model" in caplog.text
