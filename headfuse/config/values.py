"""Values as users write them: shares, token counts, mixtures of texts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from headfuse.errors import DataError


def _budget_text(value: Any) -> Any:
    if isinstance(value, (int, float, Fraction)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        parse_budget(value)
    elif not isinstance(value, dict):  # {key: .., value: ..} is another way to say it
        raise ValueError("give a share such as 0.25 or 1/4, or {key: 1/4, value: 1/8}")
    return value


def _part(value: Any) -> Any:
    return value if isinstance(value, bool) else parse_part(str(value))


def _head_dim(value: Any) -> Any:
    return parse_head_dim(str(value))


Share = Annotated[str, BeforeValidator(_budget_text)]
Part = Annotated[float, BeforeValidator(_part), Field(strict=True)]
"""A share of at least 0 and below 1."""
HeadDim = Annotated[int | str, BeforeValidator(_head_dim)]
"""Channels of a fused head, or `auto`."""
Count = Annotated[int, Field(ge=1, strict=True)]
Rate = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=0, strict=True)]


def parse_budget(text: str) -> Fraction:
    """A budget written as a decimal or a fraction, `0.25` or `1/4`.

    Raises:
        ValueError: unless it is a number above 0 and at most 1.
    """
    value = _fraction(text)
    if not 0 < value <= 1:
        raise ValueError(f"{text} is out of range: a budget is a share of the source's KV cache, above 0 and at most 1")
    return value


def parse_part(text: str) -> float:
    """A share written as a decimal or a fraction, `0.25` or `1/4`.

    Raises:
        ValueError: unless it is a number of at least 0 and below 1.
    """
    value = _fraction(text)
    if not 0 <= value < 1:
        raise ValueError(f"{text} is out of range: it must be at least 0 and below 1")
    return float(value)


def _fraction(text: str) -> Fraction:
    text = str(text).strip()
    try:
        if len(text) > 40 or re.search(r"[eE][-+]?\d{3}", text):  # 1e-999999999 is a fraction of a gigabyte
            raise ValueError
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number: write a decimal or a fraction, like 0.25 or 1/4") from None


def parse_head_dim(text: str) -> int | str:
    """A width of heads in channels, or `auto`.

    Raises:
        ValueError: for anything else.
    """
    text = text.strip()
    if text == "auto":
        return text
    if not re.fullmatch(r"\d{1,6}", text) or int(text) < 2 or int(text) % 2:
        raise ValueError(f"{text!r} is not a head width: give an even number of channels, like 96, or auto")
    return int(text)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_tokens(text: str) -> int:
    """A number of tokens: `246000`, `500k`, `50M` or `1.5B`.

    Raises:
        ValueError: for anything else, and for less than one token.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().replace("_", "").upper())
    tokens = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if tokens < 1:
        raise ValueError(f"{text!r} is not a number of tokens such as 246000, 500k, 50M or 1.5B")
    return tokens


_BYTES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", re.IGNORECASE)


def parse_memory(text: str) -> int:
    """Bytes of `24GB` (10^9), `16GiB` (2^30), `500M` or a number of bytes.

    Raises:
        ValueError: for anything else.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _BYTES[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size such as 24GB or 16GiB")
    return size


def data_name(data: str) -> str:
    """The name of the data for outputs: a hub id, or a file's name without its folders."""
    return Path(data).name if Path(data).exists() else data


def parse_data(data: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Texts with their weights from `NAME` or `NAME=WEIGHT`; without a weight it is 1.

    Raises:
        DataError: for a weight that is no number above 0, and a text that is there twice.
    """
    if isinstance(data, Mapping):
        pairs = [(name, float(weight)) for name, weight in data.items()]
    else:
        pairs = list[tuple[str, float]]()
        for entry in [data] if isinstance(data, str) else data:
            name, equals, weight = entry.rpartition("=")
            weighted = bool(equals) and not Path(entry).exists() and re.fullmatch(r"[-+.\deE]+|nan|inf", weight)
            try:
                pairs.append((name, float(weight)) if weighted else (entry, 1.0))
            except ValueError:
                pairs.append((name, math.nan))
    if not pairs:
        raise DataError("no text is given", where="--data", fix="give a text file, a folder or a hub dataset")
    for text, share in pairs:
        if not 0 < share < math.inf:
            raise DataError(f"the weight of a text is {share}", where=text, fix="give a number above 0, like 0.7")
    if len(dict(pairs)) < len(pairs):
        raise DataError("a text is given twice", where="--data", fix="give each text once, with its weight")
    return dict(pairs)


def mixture_name(data: Mapping[str, float]) -> str:
    """The name of texts and their weights for outputs."""
    if len(data) == 1:
        return data_name(next(iter(data)))
    return ", ".join(f"{data_name(name)}={weight:g}" for name, weight in data.items())
