"""Problems of configs and plans are said in our own words, with their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headfuse.config.fuse import FuseConfig, load_config
from headfuse.errors import ConfigError
from headfuse.plan import FusionPlan


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"budget": {"total": [1]}}, "budget.total: give a share such as 0.25 or 1/4, or {key: 1/4, value: 1/8}"),
        ({"budget": {"total": {"kye": 0.5, "value": 0.5}}}, "budget.total.kye: unknown key, did you mean 'key'?"),
        ({"budget": {"total": {"key": 2, "value": 0.5}}}, "budget.total.key: 2 is out of range"),
        ({"budget": {"keep_layers": [0.5]}}, "budget.keep_layers.0: must be a whole number, not 0.5"),
        ({"budget": {"key_heads": 3}}, "budget.key_heads: must be a list, not 3"),
        ({"budget": 3}, "budget: must be a mapping of options, not 3"),
        ({"calibration": {"samples": 1}}, "calibration.samples: must be at least 2, not 1"),
        ({"calibration": {"held_out": 1}}, "calibration.held_out: 1 is out of range: it must be at least 0 and"),
        ({"calibration": {"held_out": "x"}}, "calibration.held_out: 'x' is not a number: write a decimal or"),
        ({"dha": {"learning_rate": float("nan")}}, "dha.learning_rate: must be a finite number, not nan"),
        ({"dha": {"progressive": "perhaps"}}, "dha.progressive: must be true or false, not 'perhaps'"),
        ({"dha": {"b": 0}}, "dha.b: must be above 0.0, not 0"),
        ({"layout": "gpa"}, "layout: 'gpa' is unknown; did you mean 'gqa'?"),
        ({"method": 3}, "method: must be text, not 3"),
        (
            {"method": "dha", "layout": "gqa"},
            "options: method dha groups keys and values apart: it needs layout decoupled, not gqa",
        ),
        ({"seed": "9" * 500}, "seed: must be a whole number, not '9999"),
    ],
)
def test_problems_of_a_config_are_in_our_own_words(tmp_path: Path, raw: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, raw)
    message = str(caught.value)
    assert expected in message
    assert len(message) < 400
    for words in ("Input should", "value_error", "pydantic", "Value error", "function-", "Field required"):
        assert words not in message


@pytest.mark.parametrize("option", [{"budget.allocator": "uniform"}, {"budget.cross_layer": 1}])
def test_an_option_does_not_replace_a_section_of_the_wrong_form(tmp_path: Path, option: dict[str, Any]) -> None:
    """`budget: 1/8` is refused as it stands, and was dropped where another option of the budget was given."""
    (tmp_path / "config.yaml").write_text("budget: 1/8\n")
    with pytest.raises(ConfigError, match="budget: must be a mapping of options, not '1/8'"):
        load_config(str(tmp_path / "config.yaml"), option)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"plan_format": 2}', '{"layers": [{"layer_idx": "x"}], "seal": 1}'])
def test_problems_of_a_plan_are_in_our_own_words(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FusionPlan.from_json(text)
    for words in ("Input should", "value_error", "pydantic", "Value error", "Field required", "Unable to"):
        assert words not in str(caught.value)


@pytest.mark.parametrize("name", FuseConfig.model_fields)
def test_no_option_takes_anything(name: str) -> None:
    for value in ([None], object(), b"bytes"):
        with pytest.raises(ConfigError) as caught:
            load_config(None, {name: value})
        assert "Input should" not in str(caught.value)
        assert caught.value.fix
