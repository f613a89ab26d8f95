"""The errors that a user can cause and mend: each says where, what, and what to do."""

from __future__ import annotations


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
