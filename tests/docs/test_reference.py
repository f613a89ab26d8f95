"""The pages of the reference are what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import write_reference
import yaml

from headfuse.config.evaluate import EvalConfig
from headfuse.config.fuse import FuseConfig
from headfuse.config.uptrain import UptrainConfig

FOLDER = Path(__file__).parents[2] / "docs/reference"
AGAIN = "run `python scripts/write_reference.py`"


def test_commands_are_written_from_the_code() -> None:
    assert (FOLDER / "commands.md").read_text(encoding="utf-8") == write_reference.commands_page(), AGAIN


def test_options_are_written_from_the_code() -> None:
    assert (FOLDER / "options.md").read_text(encoding="utf-8") == write_reference.options_page(), AGAIN


@pytest.mark.parametrize(("place", "model", "given"), [
    (0, FuseConfig, {}), (1, UptrainConfig, {"data": {"corpus.jsonl": 1.0}, "tokens": "50M"}), (2, EvalConfig, {}),
])  # fmt: skip
def test_the_yaml_holds_every_option_with_its_default(place: int, model: Any, given: dict[str, Any]) -> None:
    block = re.findall(r"```yaml\n(.*?)```", (FOLDER / "options.md").read_text(encoding="utf-8"), re.DOTALL)[place]
    assert model.model_validate(yaml.safe_load(block)) == model.model_validate(given)


@pytest.mark.parametrize("model", [FuseConfig, UptrainConfig, EvalConfig])
def test_every_option_is_described(model: Any) -> None:
    def missing(options: Any) -> list[str]:
        inner = [
            field.annotation for field in options.model_fields.values() if hasattr(field.annotation, "model_fields")
        ]
        own = [name for name, field in options.model_fields.items() if not field.description]
        return own + [name for each in inner for name in missing(each)]

    assert missing(model) == []
