"""Runs that are cut short: killed, out of disk space, interrupted, diverged."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headfuse.checkpoint.checksums import file_sha256
from headfuse.errors import ConfigError, HeadfuseError, OutputError
from headfuse.training.loop import Progress
from tests.support.model_edits import edit_tensors
from tests.training.runs import Stop, losses, records, stop_at, train, without_dropout

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from headfuse.checkpoint.checksums import file_sha256
from headfuse.training.uptrain import uptrain
model, data, folder, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])

def start(output):
    child = os.fork()
    if not child:
        uptrain(model, data=data, tokens=1280, batch_size=2, sequence_length=16, checkpoint_every=2, learning_rate=1e-2,
                device="cpu", threads=1, output=output, resume=True)
        os._exit(0)
    return child

began = time.monotonic()
assert os.waitpid(start(folder / "whole"), 0)[1] == 0
seconds = time.monotonic() - began
wanted, out = file_sha256(folder / "whole" / "model.safetensors"), folder / "out"
chance = random.Random(kills)
while kills:
    child = start(out)
    time.sleep(chance.uniform(0.2, 1.0) * seconds)
    done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills -= 1
    if out.exists():  # it was faster, or was killed after it was done
        assert file_sha256(out / "model.safetensors") == wanted
        out.rename(folder / f"done-{kills}-{time.monotonic()}")
assert os.waitpid(start(out), 0)[1] == 0
assert file_sha256(out / "model.safetensors") == wanted
"""


@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.long), pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(fused: Path, data: str, tmp_path: Path, kills: int) -> None:
    """`kill -9` while models load, steps run, states are written: the weights in the end are the same."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", KILLED, str(fused), data, str(tmp_path), str(kills)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_goes_on_with_batches_that_are_divided_otherwise(fused: Path, data: str, tmp_path: Path) -> None:
    """The windows of a step stay the same, whatever passes they are divided into."""
    without_dropout(fused)
    whole, output = train(fused, data, output=tmp_path / "whole", loss="ce"), tmp_path / "out"
    with pytest.raises(Stop):
        train(fused, data, output=output, loss="ce", on_progress=stop_at(7))
    with pytest.raises(ConfigError) as caught:
        train(fused, data, output=output, loss="ce", batch_size=2, gradient_accumulation=2, resume=True)
    assert "batch_size x gradient_accumulation x processes (was 2 x 1 x 1, is 2 x 2 x 1)" in str(caught.value)
    with pytest.raises(ConfigError):
        train(fused, data, output=output, loss="ce", batch_size=None, gradient_accumulation=3, resume=True)
    train(fused, data, output=output, loss="ce", batch_size=None, gradient_accumulation=2, resume=True)
    for a, b in zip(losses(whole.output), losses(output), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_full_disk_keeps_the_last_state(fused: Path, data: str, tmp_path: Path) -> None:
    """Writes beyond a limit fail as those on a full disk do."""
    whole, output = train(fused, data, output=tmp_path / "whole"), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Progress) -> None:
        if progress.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(OutputError) as caught:
            train(fused, data, output=output, on_progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert [folder.name for folder in (tmp_path / "out.partial" / "state").iterdir()] == ["step-0000005"]
    train(fused, data, output=output, resume=True)
    assert file_sha256(output / "model.safetensors") == file_sha256(whole.output / "model.safetensors")


def test_states_are_also_written_as_time_passes(
    fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(fused, data, output=tmp_path / "whole")
    monkeypatch.setattr("headfuse.training.loop.STATE_SECONDS", 0.0)
    with pytest.raises(Stop):
        train(fused, data, output=tmp_path / "out", on_progress=stop_at(8))
    assert json.loads((tmp_path / "out.partial" / "resume.json").read_text())["step"] == 8
    train(fused, data, output=tmp_path / "out", resume=True)
    assert losses(tmp_path / "out") == losses(whole.output)
    sums = [file_sha256(tmp_path / name / "model.safetensors") for name in ("out", "whole")]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("step", [5, 8, 12])
def test_resumed_run_equals_an_uninterrupted_one(fused: Path, data: str, tmp_path: Path, step: int) -> None:
    whole, output = train(fused, data, output=tmp_path / "whole"), tmp_path / "out"
    with pytest.raises(Stop):
        train(fused, data, output=output, on_progress=stop_at(step))
    assert not output.exists()
    with pytest.raises(OutputError, match="interrupted run"):
        train(fused, data, output=output)
    torch.rand(7)  # the resumed run must not depend on where the generator happens to be
    resumed = train(fused, data, output=output, resume=True)
    assert file_sha256(output / "model.safetensors") == file_sha256(whole.output / "model.safetensors")
    assert losses(output) == losses(whole.output)
    assert (resumed.nll_before, resumed.nll_after) == (whole.nll_before, whole.nll_after)
    assert resumed.epochs == whole.epochs > 0
    assert {file.name for file in output.iterdir()} == {file.name for file in whole.output.iterdir()}


def test_interrupted_save_leaves_the_state_before(
    fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    whole, output = train(fused, data, output=tmp_path / "whole"), tmp_path / "out"
    save_state, calls = Accelerator.save_state, []

    def full_disk(self: Accelerator, folder: str, **options: Any) -> None:
        calls.append(folder)
        save_state(self, folder, **options)
        if len(calls) == 2:
            Path(folder, "pytorch_model.bin").write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(Accelerator, "save_state", full_disk)
    with pytest.raises(OutputError, match="checkpoint after step 10 cannot be written"):
        train(fused, data, output=output)
    state = tmp_path / "out.partial" / "state"
    assert [folder.name for folder in state.iterdir()] == ["step-0000005"]
    train(fused, data, output=output, resume=True)
    assert file_sha256(output / "model.safetensors") == file_sha256(whole.output / "model.safetensors")


@pytest.mark.parametrize("damage", ["resume.json", "no state", "half a state"])
def test_damaged_state_is_one_clear_error(fused: Path, data: str, tmp_path: Path, damage: str) -> None:
    with pytest.raises(Stop):
        train(fused, data, on_progress=stop_at(7))
    partial = tmp_path / "fused-uptrained.partial"
    (state,) = (partial / "state").iterdir()
    if damage == "resume.json":
        (partial / "resume.json").write_text('{"command": "uptrain", "recipe": {}, "inputs": {}}')
    elif damage == "no state":
        state.rename(tmp_path / "elsewhere")
    else:
        weights = state / "pytorch_model.bin"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OutputError, match=r"damaged|is missing|cannot be read") as caught:
        train(fused, data, resume=True)
    assert "--overwrite" in str(caught.value)


def test_only_the_last_state_is_kept(fused: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(fused, data, output=tmp_path / "out", on_progress=stop_at(11))
    assert [folder.name for folder in (tmp_path / "out.partial" / "state").iterdir()] == ["step-0000010"]


def test_failure_before_the_first_state_leaves_nothing(fused: Path, data: str, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(Stop):
        train(fused, data, on_progress=stop_at(3))
    assert set(tmp_path.iterdir()) == before


def test_resuming_with_other_options_is_refused(fused: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(fused, data, on_progress=stop_at(7))
    with pytest.raises(ConfigError, match=r"processes \(was 2 x 1 x 1, is 4 x 1 x 1\), seed \(was 0, is 3\)"):
        train(fused, data, resume=True, batch_size=4, seed=3)
    assert (tmp_path / "fused-uptrained.partial" / "resume.json").exists()
    train(fused, data, resume=True, learning_rate=None)
    assert records(tmp_path / "fused-uptrained")[-3]["learning_rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize("change", ["order", "shorter", "validation"])
def test_resuming_with_another_text_of_the_same_name_is_refused(
    fused: Path, data: str, tmp_path: Path, change: str
) -> None:
    documents = Path(data).read_text().splitlines(keepends=True)
    held_out = Path(data).with_name(f"held-out{Path(data).suffix}")
    held_out.write_text("".join(documents[:3]))
    options: dict[str, Any] = {"validation_data": str(held_out)}
    with pytest.raises(Stop):
        train(fused, data, on_progress=stop_at(7), **options)
    changed = held_out if change == "validation" else Path(data)
    before = changed.read_text()
    new = {"order": documents[::-1], "shorter": documents[:-1], "validation": documents[3:6]}[change]
    changed.write_text("".join(new))
    with pytest.raises(ConfigError, match="is not that of the interrupted run"):
        train(fused, data, resume=True, **options)
    changed.write_text(before)
    train(fused, data, resume=True, **options)


def test_resuming_with_other_weights_of_the_teacher_is_refused(
    source: Path, fused: Path, data: str, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train(fused, data, teacher=str(source), on_progress=stop_at(7))
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(ConfigError, match="teacher_weights"):
        train(fused, data, teacher=str(source), resume=True)


def test_diverging_run_stops_and_keeps_the_last_state(fused: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(HeadfuseError, match="at step 2; nothing was kept"):
        train(fused, data, learning_rate=1e30)
    assert not (tmp_path / "fused-uptrained.partial").exists()

    whole, output = train(fused, data, output=tmp_path / "whole"), tmp_path / "out"
    with pytest.raises(Stop):
        train(fused, data, output=output, on_progress=stop_at(8))
    with pytest.raises(HeadfuseError, match="the norm of its gradient nan") as caught:
        train(fused, data, output=output, resume=True, learning_rate=1e30)
    assert "at step 7; the state after step 5 is kept" in str(caught.value)
    assert "--resume" in str(caught.value)
    train(fused, data, output=output, resume=True)
    assert file_sha256(output / "model.safetensors") == file_sha256(whole.output / "model.safetensors")
