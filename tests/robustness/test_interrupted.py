"""Runs that are cut short by Ctrl-C, SIGTERM or kill -9, and what `--resume` and `--overwrite` make of the rest."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.workplace import LAYERS, PATIENCE, READERS, Workplace, layers_done, stop_after


@pytest.fixture
def readers(source: Workplace, tmp_path: Path) -> Workplace:
    """A run whose layers read what two layers before them cache."""
    place = Workplace(source.model, source.text, tmp_path / "whole", tmp_path / "whole", READERS)
    place.fuse()
    return replace(place, out=tmp_path / "out")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command in a process of its own and freeze it (SIGSTOP) when a few layers are done, not all."""
    processes = []

    def started(place: Workplace, *args: object) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "headfuse", *place.line(*args)]
        deadline = time.monotonic() + PATIENCE
        while True:
            process = subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
            )
            processes.append(process)
            while process.poll() is None and layers_done(place) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGSTOP)
            if process.poll() is None and 2 <= layers_done(place) < LAYERS:
                return process
            process.send_signal(signal.SIGCONT)
            assert process.wait() == 0, process.communicate()
            shutil.rmtree(place.out)  # this process slept while that one ran to its end: once more

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def heed_ctrl_c() -> None:
    """A shell that starts the tests in the background has its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_end_a_run_with_their_code_and_leave_no_output(
    place: Workplace, start: Callable[..., subprocess.Popen[str]], number: int, code: int, word: str
) -> None:
    process = start(place, "--json")
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, stderr
    assert not place.out.exists()
    assert stderr.startswith(word)
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["error"]["what"] == word
    place.fuse("--resume")
    place.assert_whole()


def test_a_killed_run_goes_on_with_resume(place: Workplace, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(place)

    # while it works, nobody else may
    for options in ([], ["--resume"], ["--overwrite"]):
        message = place.fuse(*options, code=1)
        assert "another process is writing here" in message

    process.kill()
    process.communicate()
    assert not place.out.exists()
    before = json.loads(place.done.read_text())
    assert 2 <= len(before) < LAYERS

    message = place.fuse(code=1)
    assert "--resume" in message
    assert "--overwrite" in message
    assert json.loads(place.done.read_text()) == before
    place.fuse("--resume")
    place.assert_whole()


def test_a_killed_run_with_readers_goes_on(readers: Workplace, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Layers that are done are not fused again, but what they cache is read by those that are not."""
    process = start(readers)
    process.kill()
    process.communicate()
    assert not readers.out.exists()
    readers.fuse("--resume")
    readers.assert_whole()


def test_an_interruption_before_the_first_layer_leaves_nothing(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headfuse.conversion import convert

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "plan_model", interrupt)
    assert "nothing was written" in place.fuse(code=130)
    assert not list(place.out.parent.iterdir())


# ---------------------------------------------------------------- going on


def test_resume_keeps_the_layers_that_are_done(interrupted: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    from headfuse.conversion import convert

    fused = list[int]()
    fuse_layer = convert.fuse_layer

    def counted(weights: Any, captures: Any, layer: Any, *args: Any) -> Any:
        fused.append(layer.layer_idx)
        return fuse_layer(weights, captures, layer, *args)

    monkeypatch.setattr(convert, "fuse_layer", counted)
    interrupted.fuse("--resume")
    assert min(fused) == 5
    interrupted.assert_whole()


def test_a_run_can_be_interrupted_again_and_again(place: Workplace) -> None:
    for layers in (1, 2, 9, LAYERS):
        stop_after(place, layers, "--resume")
        assert not place.out.exists()
    place.fuse("--resume")
    place.assert_whole()


def test_resume_with_nothing_to_go_on_with_starts_anew(place: Workplace) -> None:
    place.fuse("--resume")
    place.assert_whole()


def test_overwrite_starts_anew(interrupted: Workplace) -> None:
    (interrupted.partial / "stale.txt").write_text("of the interrupted run")
    interrupted.fuse("--overwrite")
    interrupted.assert_whole()


def test_a_partial_folder_that_cannot_go_on_is_cleared(interrupted: Workplace) -> None:
    """Killed before resume.json: what is there belongs to nothing."""
    (interrupted.partial / "resume.json").unlink()
    (interrupted.partial / "stale.txt").write_text("of the interrupted run")
    interrupted.fuse()
    interrupted.assert_whole()


def test_a_foreign_folder_under_the_partial_name_is_left_alone(place: Workplace) -> None:
    place.partial.mkdir()
    (place.partial / "mine").write_text("mine")
    for options in ([], ["--resume"], ["--overwrite"]):
        assert "in the way" in place.fuse(*options, code=1)
    assert (place.partial / "mine").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "[0, 1", "null", None])
def test_a_torn_record_of_layers_does_them_again(interrupted: Workplace, content: str | None) -> None:
    if content is None:
        interrupted.done.unlink()
    else:
        interrupted.done.write_text(content)
    interrupted.fuse("--resume")
    interrupted.assert_whole()


@pytest.mark.parametrize("where", ["its temporary file", "the rename"])
def test_the_record_of_layers_is_never_torn(place: Workplace, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Stopped inside the write of done.json: the record of before is what is there."""
    stop_after(place, 3)
    before = place.done.read_text()
    write, rename = Path.write_text, Path.replace

    def torn_write(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if self.name.startswith("done.json"):
            write(self, text[: len(text) // 2], *args, **kwargs)
            raise KeyboardInterrupt
        return write(self, text, *args, **kwargs)

    def torn_rename(self: Path, target: Path) -> Path:
        if self.name.startswith("done.json"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        if where == "the rename":
            patch.setattr(Path, "replace", torn_rename)
        else:
            patch.setattr(Path, "write_text", torn_write)
        place.fuse("--resume", code=130)
    assert place.done.read_text() == before
    place.fuse("--resume")
    place.assert_whole()
