"""Folders that an earlier headfuse wrote: said on loading and by `--verify`, renewed by `export --refresh`."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import headfuse
from headfuse.checkpoint.plan_file import read_plan, verify, write_plan
from headfuse.modeling import CODE
from headfuse.models import model_code
from tests.support.commands import fuse, run
from tests.support.model_outputs import logits
from tests.support.tiny_models import tiny_model

CODE_OF = {"decoupled": CODE["headfuse"], "layerwise": CODE["nemotron-nas"]}


@pytest.fixture(scope="module", params=CODE_OF)
def current(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    fuse(tiny_model(folder / "model"), folder / "out", "-b", "0.5", "--layout", request.param, "--preset", "fast")
    return folder / "out"


one_layout = pytest.mark.parametrize("current", ["decoupled"], indirect=True)


@pytest.fixture
def old(current: Path, tmp_path: Path) -> Path:
    """The folder as an earlier version wrote it: other code, without a number, and a plan.json with its checksums."""
    return aged(shutil.copytree(current, tmp_path / "old"))


def aged(folder: Path, version: str = "") -> Path:
    for file in folder.glob("*.py"):
        lines = file.read_text().splitlines(keepends=True)
        lines = [version if line.startswith("CODE_VERSION") else line for line in lines]
        file.write_text("".join(lines) + "\n# as it was\n")
    write_plan(folder, read_plan(folder))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluate(folder: Path, *args: object, code: int = 0) -> str:
    text = ("--samples", 2, "--sequence-length", 16, "--threads", 1)
    return " ".join(run("eval", folder, *text, *args, code=code).split())


def test_old_code_is_said_on_loading_and_by_verify(old: Path, current: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "model code is that of the installed headfuse." in evaluate(current, "--verify")
    assert not [record for record in caplog.records if "model code" in record.message]
    headfuse.load(old)
    headfuse.load(old)
    (warning,) = [record.message for record in caplog.records if "model code" in record.message]
    assert warning.startswith(str(old))
    assert "older than the installed headfuse's" in warning
    assert f"headfuse export {old} --refresh" in warning
    output = evaluate(old, "--verify")
    assert "Verified: every file is as headfuse wrote it; its model code is older" in output
    assert json.loads(evaluate(old, "--verify", "--json").splitlines()[-1])["model_code"] == "older"


def test_refresh_changes_the_code_and_nothing_else(old: Path, current: Path, tmp_path: Path) -> None:
    (old / ".gitattributes").write_text("*.safetensors lfs")
    before, weights = content(old), (old / "model.safetensors").stat()
    plan, expected = read_plan(old), logits(old)
    files = CODE_OF[plan.layout]
    link = tmp_path / "link"
    link.symlink_to(old)
    document = json.loads(run("export", link, "--refresh", "--json").splitlines()[-1])
    assert document["refreshed"] == sorted(file.name for file in files)
    assert document["output"] == str(old)
    assert link.is_symlink()
    after, names = content(old), {file.name for file in files}
    assert all(after[file.name] == file.read_bytes() for file in files)
    assert {n: b for n, b in after.items() if n not in names | {"plan.json"}} == {
        n: b for n, b in before.items() if n not in names | {"plan.json"}
    }
    assert (old / "model.safetensors").stat().st_ino == weights.st_ino
    renewed = verify(old)
    assert renewed.files == read_plan(current).files
    assert renewed.model_copy(update={"files": {}, "seal": None}) == plan.model_copy(update={"files": {}, "seal": None})
    assert torch.equal(logits(old), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]
    assert "is up to date" in run("export", old, "--refresh")
    assert content(old) == after


@one_layout
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "plan.json"])
def test_refresh_refuses_a_folder_that_has_changed(old: Path, file: str) -> None:
    data = bytearray((old / file).read_bytes())
    place = data.index(b"vocab") if file == "config.json" else data.index(b'"seal": "') + 12 if "plan" in file else -9
    data[place] ^= 1
    (old / file).write_bytes(data)
    before = content(old)
    assert file in run("export", old, "--refresh", code=1)
    assert content(old) == before


@one_layout
def test_refresh_repairs_the_code_itself(old: Path) -> None:
    (old / "modeling_headfuse.py").write_text("damaged")
    (old / "configuration_headfuse.py").unlink()
    run("export", old, "--refresh")
    assert verify(old).files.keys() >= {"modeling_headfuse.py", "configuration_headfuse.py"}


@one_layout
def test_newer_code_is_left_alone(current: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newer = aged(shutil.copytree(current, tmp_path / "newer"), "CODE_VERSION = 99\n")
    before = content(newer)
    headfuse.load(newer)
    assert "update headfuse" in caplog.text
    assert "update headfuse" in run("export", newer, "--refresh", code=1)
    assert content(newer) == before


@one_layout
def test_a_folder_that_transformers_saved_can_be_renewed(current: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(current).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/modeling_headfuse.py").write_text("# old")
    run("export", tmp_path / "saved", "--refresh")
    assert not (tmp_path / "saved/plan.json").exists()
    assert model_code.code_state(tmp_path / "saved") == "current"


@one_layout
def test_a_failure_leaves_the_folder_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(old)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("headfuse.models.model_code.shutil.copyfile", fail)
    assert "No space left" in run("export", old, "--refresh", code=1)
    assert content(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["old"]


@one_layout
def test_without_hard_links_files_are_copied(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("headfuse.models.model_code.os.link", fail)
    run("export", old, "--refresh")
    verify(old)


@one_layout
def test_an_interrupted_run_beside_the_folder_is_kept(old: Path) -> None:
    partial = old.with_name("old.partial")
    partial.mkdir()
    (partial / "resume.json").write_text("{}")
    assert "an interrupted run is here" in run("export", old, "--refresh", code=1)
    assert (partial / "resume.json").exists()


@one_layout
def test_other_refusals(old: Path, tmp_path: Path) -> None:
    stock = tiny_model(tmp_path / "stock")
    assert "stock" in run("export", stock, "--refresh", code=1)
    assert "no such folder" in run("export", "org/name", "--refresh", code=1)
    for options in (["--to", "gqa"], ["-o", tmp_path / "out"], ["--overwrite"]):
        assert "--refresh alone" in run("export", old, "--refresh", *options, code=2)
    run("export", old, code=2)
