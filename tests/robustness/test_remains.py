"""What is left of an interrupted run is not mixed with another one, and damage is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from tests.support.workplace import Workplace


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
    "compute_dtype": lambda place: ["--compute-dtype", "bfloat16"],
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
