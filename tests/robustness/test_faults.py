"""What happens to the output when a process dies at any moment, its input vanishes, or two want the same place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headfuse.checkpoint.interrupted import write_resume
from headfuse.checkpoint.output import output_file, output_folder
from headfuse.checkpoint.plan_file import verify
from headfuse.cli.app import app
from headfuse.conversion.resume import FinishedLayers
from headfuse.errors import OutputError
from tests.support.commands import run
from tests.support.tiny_models import tiny_model

EVENTS = (
    "open", "shutil.", "tempfile.", "fcntl.",
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir", "os.scandir",
)  # fmt: skip


def killed_at(count: int, work: Callable[[], object], where: Path) -> bool:
    """Run `work` in a child that is killed (SIGKILL) at its `count`-th file operation under `where`; whether it was."""
    child = os.fork()
    if child == 0:
        left = count

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal left
            if event.startswith(EVENTS) and str(where) in str(args):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_file_operation(tmp_path: Path, overwrite: bool) -> None:
    """Under the output's name lies what was there, or what was to come, whole; the next run leaves nothing else."""
    config = b'{"model_type": "llama"}'
    old, new = {"config.json": config}, {"config.json": config, "weights": b"w" * 9}

    def write(out: Path) -> None:
        with output_folder(out, overwrite=overwrite) as partial:
            (partial / "state").mkdir()
            (partial / "state/done.json").write_text("[]")
            write_resume(partial, "fuse", {})
            for name, content in new.items():
                (partial / name).write_bytes(content)

    seen = set()
    for count in range(1000):
        place = tmp_path / f"{count}"
        out = place / "out"
        place.mkdir()
        if overwrite:
            out.mkdir()
            (out / "config.json").write_bytes(config)
        killed = killed_at(count, lambda out=out: write(out), place)  # type: ignore[misc]
        left = files(out) if out.exists() else None
        if left is not None:
            left.pop(".lock", None)
        assert left in (new, old if overwrite else None, None), count
        seen.add(None if left is None else len(left))
        with output_folder(out, overwrite=True) as partial:
            for name, content in new.items():
                (partial / name).write_bytes(content)
        assert files(out) == new
        assert [entry.name for entry in place.iterdir()] == ["out"], count
        shutil.rmtree(place)
        if not killed:
            break
    else:
        pytest.fail("the run never came to its end")
    assert count > 20
    assert seen >= {len(new), len(old) if overwrite else None}


def test_what_is_finished_is_not_done_again_after_a_kill(tmp_path: Path) -> None:
    """Also while the output gets its name: `state/` and `resume.json` lie aside then."""
    for count in range(1000):
        place, finished = tmp_path / f"{count}", tmp_path / f"{count}.finished"
        place.mkdir()

        def write(place: Path = place, finished: Path = finished) -> None:
            with output_folder(place / "out", resume=True) as partial:
                if not (partial / "resume.json").exists() or not (partial / "state/done.json").exists():
                    assert not finished.exists(), place
                    (partial / "state").mkdir(exist_ok=True)
                    (partial / "state/done.json").write_text("[]")
                    write_resume(partial, "fuse", {})
                    finished.touch()

        killed = killed_at(count, write, place)
        if not (place / "out").exists():
            write()
        if not killed:
            break
    else:
        pytest.fail("the run never came to its end")
    assert count > 10


def test_a_run_whose_folder_was_removed_leaves_that_of_the_next_alone(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def write() -> None:
        with output_folder(out):
            shutil.rmtree(partial)
            partial.mkdir()
            for name in (".lock", "config.json"):
                (partial / name).write_text("of another run")

    with pytest.raises(OutputError, match="was removed"):
        write()
    assert not out.exists()
    assert (partial / "config.json").read_text() == "of another run"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_killed_at_any_operation(tmp_path: Path, overwrite: bool) -> None:
    """The same for an output that is one file."""

    def write(out: Path, again: bool = False) -> None:
        with output_file(out, overwrite=overwrite or again) as partial:
            partial.write_bytes(b"new")

    for count in range(200):
        place = tmp_path / f"{count}"
        place.mkdir()
        out = place / "model.gguf"
        if overwrite:
            out.write_bytes(b"old")
        killed = killed_at(count, lambda out=out: write(out), place)  # type: ignore[misc]
        assert (out.read_bytes() if out.exists() else None) in (b"new", b"old" if overwrite else None, None), count
        write(out, again=True)
        assert files(place) == {"model.gguf": b"new"}, count
        if not killed:
            break
    else:
        pytest.fail("the run never came to its end")
    assert count > 2


def test_a_download_beside_the_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.gguf.partial").write_bytes(b"mine")
    with output_file(tmp_path / "model.gguf") as partial:
        partial.write_bytes(b"new")
    assert files(tmp_path) == {"model.gguf": b"new", "model.gguf.partial": b"mine"}


def test_an_exchange_that_was_cut_short_gives_the_old_output_back(tmp_path: Path) -> None:
    old = tmp_path / "out.old-a1b2c3d4" / "out"
    old.mkdir(parents=True)
    (old / "config.json").write_text("old")
    (old.parent / ".headfuse").touch()
    with pytest.raises(OutputError, match="already exists"), output_folder(tmp_path / "out"):
        pass
    assert files(tmp_path) == {"out/config.json": b"old"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("source") / "model", layers=3)


def line(model: Path, out: Path, *args: object) -> list[str]:
    options = ("--data", model.parent / "text.txt", "--budget", "0.5", "--samples", 4, "--sequence-length", 32)
    return ["fuse", str(model), "-o", str(out), "--threads", "1", "--preset", "fast", *map(str, (*options, *args))]


def test_a_conversion_killed_anywhere_goes_on(source: Path, tmp_path: Path) -> None:
    run(*line(source, tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    points = [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233]
    killed = [
        killed_at(point, lambda at=at: CliRunner().invoke(app, line(source, at / "out")), at)  # type: ignore[misc]
        for point in points
        if (at := tmp_path / str(point)) is not None
    ]
    assert sum(killed) > 6
    for point, was_killed in zip(points, killed, strict=True):
        at = tmp_path / str(point)
        assert was_killed or files(at / "out") == whole
        if not (at / "out").exists():
            run(*line(source, at / "out", "--resume"))
        (at / "out/.lock").unlink(missing_ok=True)
        assert files(at / "out") == whole, point
        assert [entry.name for entry in at.iterdir()] == ["out"], point


def vanish(model: Path) -> None:
    shutil.rmtree(model)


def lose_the_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def cut_off(model: Path) -> None:
    os.truncate(model / "model.safetensors", 4000)


@pytest.mark.parametrize("loss", [vanish, lose_the_weights, cut_off])
def test_an_input_that_vanishes_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Callable[[Path], None]
) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    shutil.copyfile(source.parent / "text.txt", tmp_path / "text.txt")
    run(*line(model, tmp_path / "whole"))
    add = FinishedLayers.add

    def add_then_lose(self: FinishedLayers, layer_idx: int) -> None:
        add(self, layer_idx)
        loss(model)

    with monkeypatch.context() as patch:
        patch.setattr(FinishedLayers, "add", add_then_lose)
        message = run(*line(model, tmp_path / "out"), code=1)
    assert str(model / "model.safetensors") in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
    shutil.copytree(source, model, dirs_exist_ok=True)
    run(*line(model, tmp_path / "out", "--resume"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.long
def test_two_processes_that_start_together(source: Path, tmp_path: Path) -> None:
    """One of them writes the output; the other is told so."""
    command = [sys.executable, "-m", "headfuse", *line(source, tmp_path / "out")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], messages
    refused = messages[0] if both[0].returncode else messages[1]
    assert any(
        reason in refused for reason in ("another process", "already exists", "appeared while", "interrupted run")
    )
    verify(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


# ---------------------------------------------------------------- checksums


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    run(*line(source, out))
    return out


def evaluate(folder: Path, *args: object, code: int = 0) -> str:
    return run("eval", folder, "--samples", 2, "--sequence-length", 32, "--threads", 1, *args, code=code)


def test_verify_finds_a_flipped_byte_in_any_file(source: Path, written: Path, tmp_path: Path) -> None:
    text = ("--data", source.parent / "text.txt")
    assert json.loads(evaluate(written, "--verify", "--json", *text).splitlines()[-1])["verified"] is True
    names = sorted(file.name for file in written.iterdir())
    assert {"plan.json", "model.safetensors", "config.json"} <= set(names)
    for name in names:
        size = (written / name).stat().st_size
        for place in {0, size // 3, size // 2, size - 1}:
            copy = shutil.copytree(written, tmp_path / "copy")
            content = bytearray((copy / name).read_bytes())
            content[place] ^= 1
            (copy / name).write_bytes(content)
            message = evaluate(copy, "--verify", *text, code=1)
            # a plan.json that says something else may accuse another file, too
            assert name in message, (name, place)
            assert message.startswith("error: ")
            shutil.rmtree(copy)


def test_verify_finds_missing_and_foreign_files(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    (copy / "evil.py").write_text("")
    message = evaluate(copy, "--verify", code=1)
    assert "tokenizer.json is missing" in message
    assert "evil.py was not written with the others" in message


def test_verify_needs_checksums(source: Path) -> None:
    assert "plan.json" in evaluate(source, "--verify", code=1)


# ---------------------------------------------------------------- determinism


def test_processes_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """Whatever the order of sets, and from one file or from shards."""
    from transformers import AutoModelForCausalLM

    sharded = shutil.copytree(source, tmp_path / "sharded/model")
    shutil.copyfile(source.parent / "text.txt", tmp_path / "sharded/text.txt")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(sharded, max_shard_size="20KB")
    (sharded / "model.safetensors").unlink()
    shutil.copyfile(source / "config.json", sharded / "config.json")
    shutil.copyfile(source / "generation_config.json", sharded / "generation_config.json")
    command = [sys.executable, "-m", "headfuse", *line(sharded, tmp_path / "one")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True)
    run(*line(source, tmp_path / "two"))
    assert files(tmp_path / "one") == files(tmp_path / "two")
