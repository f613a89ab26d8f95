"""An output that is replaced stays until the new one is complete."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from tests.support.workplace import Workplace, stop_after


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


def an_exchange_that_fails(
    source: Workplace, place: Workplace, context: pytest.MonkeyPatch, error: BaseException, taken: bool = False
) -> None:
    """An old output with a file of its own, in whose place the new one cannot go; `taken`: by another process."""
    shutil.copytree(source.whole, place.out)
    (place.out / "mine").write_text("mine")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self != place.partial:
            return rename(self, target)
        if taken:
            place.out.mkdir()
        raise error

    context.setattr(Path, "rename", failing)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (PermissionError(errno.EACCES, "held"), 1)])
def test_nothing_is_lost_when_the_exchange_fails(
    source: Workplace, place: Workplace, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    """The old output comes back, and the finished one needs a rename only."""
    with monkeypatch.context() as context:
        an_exchange_that_fails(source, place, context, error)
        place.fuse("--overwrite", code=code)
    assert (place.out / "mine").read_text() == "mine"
    assert {path.name for path in place.out.parent.iterdir()} == {"out", "out.partial"}
    place.fuse("--overwrite", "--resume")
    place.assert_whole()
    assert {path.name for path in place.out.parent.iterdir()} == {"out"}


def test_a_backup_that_looks_like_a_leftover_is_left_alone(source: Workplace, place: Workplace) -> None:
    backup = place.out.with_name("out.old-20260101") / "out"
    shutil.copytree(source.whole, backup)
    place.fuse()
    assert (backup / "plan.json").exists()


@pytest.mark.parametrize("folder", [".git", "checkpoint-500", "src"])
def test_overwrite_leaves_folders_that_no_model_has(source: Workplace, place: Workplace, folder: str) -> None:
    shutil.copytree(source.whole, place.out)
    (place.out / folder).mkdir()
    assert "other folders" in place.fuse("--overwrite", code=1)
    assert (place.out / folder).exists()


def test_overwrite_leaves_a_folder_whose_config_is_of_no_model(place: Workplace) -> None:
    place.out.mkdir()
    (place.out / "config.json").write_text('{"port": 8080}')
    assert "is no model folder" in place.fuse("--overwrite", code=1)
    assert (place.out / "config.json").exists()


def test_overwriting_a_link_leaves_what_it_points_to(source: Workplace, place: Workplace) -> None:
    target = shutil.copytree(source.whole, place.out.parent / "target")
    place.out.symlink_to(target)
    place.fuse("--overwrite")
    place.assert_whole()
    assert not place.out.is_symlink()
    assert (target / "plan.json").exists()


def test_an_old_output_that_cannot_go_back_stays_aside(
    source: Workplace, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the name in the moment of the exchange."""
    an_exchange_that_fails(source, place, monkeypatch, PermissionError(errno.EACCES, "taken"), taken=True)
    place.fuse("--overwrite", code=1)
    (old,) = place.out.parent.glob("out.old-*")
    assert (old / "out/mine").read_text() == "mine"
