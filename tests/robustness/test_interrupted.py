"""Runs that are cut short by Ctrl-C, SIGTERM or kill -9, and what `--resume` and `--overwrite` make of the rest."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import run
from tests.support.tiny_models import tiny_model

LAYERS = 16
"""Enough that a run goes on for a while after its first layers are done."""
OPTIONS = ("--layout", "decoupled", "--budget", "0.5", "--samples", "8", "--sequence-length", "32")
READERS = ("--layout", "latent", "--cross-layer", "2", *OPTIONS[2:])
PATIENCE = 300.0
"""Seconds; only a machine that hangs takes so long."""


@dataclass
class Workplace:
    """A source model, the files of an uninterrupted run on it, and the folder that a test works in."""

    model: Path
    text: Path
    whole: Path
    out: Path
    options: tuple[str, ...] = OPTIONS

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def done(self) -> Path:
        return self.partial / "state" / "done.json"

    def line(self, *args: object) -> list[str]:
        return [
            "fuse",
            *map(str, (self.model, "-o", self.out, "--data", self.text, "--threads", 1, *self.options, *args)),
        ]

    def fuse(self, *args: object, code: int = 0) -> str:
        """The command to its end, in this process."""
        return run(*self.line(*args), code=code)

    def assert_whole(self) -> None:
        """The output equals that of a run that nobody interrupted."""
        for name in ("model.safetensors", "plan.json", "config.json", "README.md", "headfuse.yaml"):
            assert (self.out / name).read_bytes() == (self.whole / name).read_bytes(), name
        assert {file.name for file in self.out.iterdir()} == {file.name for file in self.whole.iterdir()}
        assert not self.partial.exists()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model(folder / "model", layers=LAYERS)
    place = Workplace(model, folder / "text.txt", folder / "whole", folder / "whole")
    place.fuse()
    return place


@pytest.fixture
def place(source: Workplace, tmp_path: Path) -> Workplace:
    return Workplace(source.model, source.text, source.whole, tmp_path / "out")


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


def layers_done(place: Workplace) -> int:
    try:
        return len(json.loads(place.done.read_text()))
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def remains(source: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `.partial` folder of a run that was stopped after some layers, for every test to copy."""
    place = Workplace(source.model, source.text, source.whole, tmp_path_factory.mktemp("remains") / "out")
    stop_after(place, 5)
    return place.partial


def stop_after(place: Workplace, layers: int, *args: object) -> None:
    """Run the command in this process until a layer is recorded, then stop it as Ctrl-C does."""
    from headfuse.conversion.resume import FinishedLayers

    add = FinishedLayers.add

    def interrupted(self: FinishedLayers, layer_idx: int) -> None:
        add(self, layer_idx)
        if layer_idx + 1 == layers:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinishedLayers, "add", interrupted)
        place.fuse(*args, code=130)


@pytest.fixture
def interrupted(place: Workplace, remains: Path) -> Workplace:
    """A run that was stopped after five layers."""
    shutil.copytree(remains, place.partial)
    return place


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


def other_text(place: Workplace) -> list[object]:
    """The same name, another content."""
    text = place.out.parent / "text.txt"
    text.write_text(" ".join(reversed(place.text.read_text().split())))
    return ["--data", text]


def other_model(place: Workplace) -> list[object]:
    model = shutil.copytree(place.model, place.out.parent / "model")
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\0\0\0\0"
    weights.write_bytes(content)
    place.model = model
    return []


CHANGES: dict[str, Callable[[Workplace], list[object]]] = {
    "budget": lambda place: ["--budget", "0.75"],
    "method": lambda place: ["--method", "mean"],
    "allocator": lambda place: ["--allocator", "uniform"],
    "layout": lambda place: ["--layout", "gqa"],
    "seed": lambda place: ["--seed", 1],
    "samples": lambda place: ["--samples", 6],
    "dtype": lambda place: ["--dtype", "bfloat16"],
    "text": other_text,
    "model": other_model,
    "plan": lambda place: ["--plan", place.whole / "plan.json"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_never_mixes_two_configurations(interrupted: Workplace, name: str) -> None:
    before = {file.name: file.read_bytes() for file in interrupted.partial.iterdir() if file.is_file()}
    message = interrupted.fuse("--resume", *CHANGES[name](interrupted), code=1)
    assert "another one" in message
    assert "--overwrite" in message
    assert not interrupted.out.exists()
    assert {file.name: file.read_bytes() for file in interrupted.partial.iterdir() if file.is_file()} == before


def test_resume_with_another_content_of_the_same_text_file(interrupted: Workplace) -> None:
    """Even where every option is the same to the letter."""
    text, content = interrupted.text, interrupted.text.read_text()
    try:
        text.write_text(" ".join(reversed(content.split())))
        assert "differs in text" in interrupted.fuse("--resume", code=1)
    finally:
        text.write_text(content)
    interrupted.fuse("--resume")
    interrupted.assert_whole()


# ---------------------------------------------------------------- damaged remains


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


def truncate(place: Workplace) -> None:
    weights = place.partial / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Workplace], object]] = {
    "weights are gone": lambda place: (place.partial / "model.safetensors").rename(place.partial / "elsewhere"),
    "weights are cut off": truncate,
    "resume.json is no JSON": lambda place: (place.partial / "resume.json").write_text("{"),
    "resume.json is of uptrain": lambda place: (place.partial / "resume.json").write_text('{"command": "uptrain"}'),
    "the plan is gone": lambda place: (place.partial / "state/plan.json").unlink(),
    "the plan is damaged": lambda place: (place.partial / "state/plan.json").write_text("{}"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_remains_are_refused_and_overwrite_mends_them(interrupted: Workplace, name: str) -> None:
    DAMAGES[name](interrupted)
    message = interrupted.fuse("--resume", code=1)
    assert "\nerror: " in message
    assert "--overwrite" in message
    assert "unexpected" not in message
    assert not interrupted.out.exists()
    interrupted.fuse("--overwrite")
    interrupted.assert_whole()


# ---------------------------------------------------------------- replacing


@pytest.mark.parametrize("options", [["--overwrite"], ["--overwrite", "--resume"]])
def test_an_output_that_is_replaced_stays_until_the_new_one_is_complete(
    source: Workplace, place: Workplace, options: list[str]
) -> None:
    shutil.copytree(source.whole, place.out)
    (place.out / "mine").write_text("mine")
    stop_after(place, 3, "--overwrite")
    assert (place.out / "mine").exists()
    place.fuse(*options)
    place.assert_whole()
    assert {path.name for path in place.out.parent.iterdir()} == {"out"}


def test_the_old_output_comes_back_when_the_exchange_fails(
    source: Workplace, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(source.whole, place.out)
    (place.out / "mine").write_text("mine")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == place.partial:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    place.fuse("--overwrite", code=130)
    assert (place.out / "mine").read_text() == "mine"
    assert {path.name for path in place.out.parent.iterdir()} == {"out"}


def test_overwriting_a_link_leaves_what_it_points_to(source: Workplace, place: Workplace) -> None:
    target = shutil.copytree(source.whole, place.out.parent / "target")
    place.out.symlink_to(target)
    place.fuse("--overwrite")
    place.assert_whole()
    assert not place.out.is_symlink()
    assert (target / "plan.json").exists()
