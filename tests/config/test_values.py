"""Values as users write them: token counts, texts and their mixtures."""

from pathlib import Path
from typing import Any

import pytest

from headfuse.config.values import data_name, parse_data, parse_tokens
from headfuse.errors import DataError


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("246000", 246_000), ("500k", 500_000), ("50M", 50_000_000), ("1.5B", 1_500_000_000), ("1_000", 1000)],
)
def test_tokens_on_the_command_line(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "M", "-5", "0", "1e6", "5 apples", "nan", "0.0001K"])
def test_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of tokens"):
        parse_tokens(text)


def test_data_name_holds_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("t")
    assert data_name(str(tmp_path / "a.txt")) == "a.txt"
    assert data_name("org/name:train") == "org/name:train"


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ("a.jsonl", {"a.jsonl": 1.0}),
        (["a.jsonl=0.7", "org/name/config:split=3"], {"a.jsonl": 0.7, "org/name/config:split": 3.0}),
        (["x=y.txt", "b=1e-2"], {"x=y.txt": 1.0, "b": 0.01}),
        ({"a": 2}, {"a": 2.0}),
    ],
)
def test_texts_and_their_weights(given: Any, weights: dict[str, float]) -> None:
    assert parse_data(given) == weights


@pytest.mark.parametrize("given", [[], ["a=0"], ["a=-1"], ["a=nan"], ["a=1-2"], ["a", "a=2"], {"a": float("inf")}])
def test_no_mixture(given: Any) -> None:
    with pytest.raises(DataError):
        parse_data(given)
