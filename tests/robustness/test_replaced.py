"""An output that is replaced stays until the new one is complete."""

from __future__ import annotations

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
