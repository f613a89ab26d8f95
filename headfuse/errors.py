"""The errors that a user can cause and fix: each says where, what, and what to do."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class HeadfuseError(Exception):
    """An expected failure: printed as one message with exit code 1, never as a traceback.

    Args:
        what: the problem, one sentence without a final full stop.
        where: the file, option or tensor that it concerns.
        fix: what the user can do about it.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, None if where is None else str(where), fix
        super().__init__(what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.fix}" if self.fix else head


class ConfigError(HeadfuseError):
    """A YAML config, an option or a plan that cannot be used."""


class BudgetError(ConfigError):
    """A budget that no layout of this model can meet."""


class CheckpointError(HeadfuseError):
    """A model folder that is missing, damaged or does not match its config."""


class UnsupportedModelError(CheckpointError):
    """A model family, or a feature of one, that headfuse does not convert."""


class DataError(HeadfuseError):
    """Text that is missing, empty or too short."""


class OutputError(HeadfuseError):
    """An output folder that exists, is locked, or cannot be written."""


class MissingExtraError(HeadfuseError):
    """An optional package that this call needs and that is not installed."""


def validation_summary(error: ValidationError) -> str:
    """All problems of a pydantic error in one message, each with its place."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        message = problem_words(problem)
        lines.append(f"{place}: {message}" if place else message)
    return "; ".join(lines)


_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "unknown key",
    "finite_number": "must be a finite number, not {found}",
    "greater_than": "must be above {gt}, not {found}",
    "greater_than_equal": "must be at least {ge}, not {found}",
    "less_than": "must be below {lt}, not {found}",
    "less_than_equal": "must be at most {le}, not {found}",
    "json_invalid": "is not valid JSON: {error}",
}
"""Kinds of pydantic problems, in headfuse's words."""
_TYPES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "tuple": "a list",
    "list": "a list", "dict": "a mapping", "model": "a mapping of options",
}  # fmt: skip
"""Expected types, by the first word of the problem's kind."""


def problem_words(problem: Mapping[str, Any]) -> str:
    """Describe a problem of a pydantic error: the expected value, the found one, and for names the nearest."""
    kind, found = problem["type"], reprlib.repr(problem["input"])
    context = problem.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    if kind in _WORDS:
        return _WORDS[kind].format(**context, found=found)
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(problem["input"]), names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{found} is unknown; {hint}choose from {context['expected']}"
    wanted = _TYPES.get(kind.split("_")[0])
    return f"must be {wanted}, not {found}" if wanted else f"cannot be {found}"
