"""Every option of `eval` that decides its figures."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from headfuse.choices import CacheDtype, RulerTask
from headfuse.config.loading import Options
from headfuse.config.values import Count, parse_memory
from headfuse.errors import ConfigError


def _listed(value: Any, option: str) -> Any:
    """The items of a comma-separated option."""
    if not isinstance(value, str):
        return value
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:  # an unset variable of a script: nothing would be measured
        raise ConfigError("names nothing", where=option, fix="give one or more, or leave the option out")
    return names


def _names(value: Any, info: ValidationInfo) -> Any:
    return _listed(value, _option(info))


def _option(info: ValidationInfo) -> str:
    return f"--{info.field_name}".replace("_", "-")


def _lengths(value: Any, info: ValidationInfo) -> Any:
    option = _option(info)
    parts = _listed(value, option)
    if isinstance(value, str):
        if not all(part.isdigit() for part in parts):
            raise ConfigError(
                f"{value!r} is not a list of token counts", where=option, fix="give counts such as 512,2048"
            )
        return [int(part) for part in parts]
    return parts


def _memory(value: Any) -> Any:
    return parse_memory(value) if isinstance(value, str) else value


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each value once, in order: the prompts of a length that is given twice would count twice."""
    return tuple(dict.fromkeys(values))


_ONLY_WITH = {
    "tasks_path": "tasks", "limit": "tasks", "passkey_trials": "passkey", "ruler_tasks": "ruler",
    "ruler_trials": "ruler",
}  # fmt: skip
"""Options that have no effect without another one."""


class EvalConfig(Options):
    """The measurements and their text; options are named as on the command line."""

    data: str = "default"
    """Evaluation text: a file, a folder or a hub dataset. A document's field `source` names its domain."""
    baseline: str | None = None
    """Model to compare with, usually the source; it must have the same tokenizer."""
    samples: int = 24
    """Number of windows of text; if the text is shorter, a warning says how many were read."""
    sequence_length: int = 512
    """Tokens in a window."""
    stride: int | None = None
    """Tokens between the beginnings of two windows; null: windows do not overlap."""
    tasks: Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_once)] = ()
    """Task names of lm-evaluation-harness."""
    tasks_path: tuple[str, ...] = ()
    """Folders of local task files."""
    limit: Count | None = None
    """Questions of each task; null: all."""
    passkey: Annotated[tuple[int, ...], BeforeValidator(_lengths), AfterValidator(_once)] = ()
    """Context lengths of the retrieval test, in tokens."""
    passkey_trials: Count = 10
    """Prompts of each length."""
    ruler: Annotated[tuple[int, ...], BeforeValidator(_lengths), AfterValidator(_once)] = ()
    """Context lengths of long-context tasks like RULER's, in tokens, answer included."""
    ruler_tasks: Annotated[tuple[RulerTask, ...], BeforeValidator(_names), AfterValidator(_once)] = get_args(RulerTask)
    """Tasks at these lengths: needle retrieval (niah_..), variable tracking (vt), common words (cwe)."""
    ruler_trials: Count = 10
    """Prompts for each of these tasks and lengths."""
    cache_dtype: CacheDtype | None = None
    """Simulate a KV cache of this dtype: fp8, int8, int4, int3 or int2; the baseline keeps its own."""
    memory: Annotated[int | None, BeforeValidator(_memory)] = Field(default=None, ge=0)
    """Memory, such as 24GB: reports the longest context and the largest batch that fit beside the weights."""
    speed: bool = False
    """Measure decoding speed against the baseline."""
    seed: int | None = None
    """Shuffle the documents; null: read them in the order of the file."""

    @model_validator(mode="after")
    def _go_together(self) -> EvalConfig:
        """Refuse options that do not go together."""
        if self.samples < 1 or self.sequence_length < 2:
            raise ConfigError(
                f"{self.samples} samples of {self.sequence_length} tokens hold no prediction",
                fix="give 1 and 2 or more",
            )
        if not 1 <= self.step <= self.sequence_length:
            raise ConfigError(
                f"{self.stride} is not between 1 and the window's {self.sequence_length} tokens",
                where="--stride",
                fix="leave it out for independent windows",
            )
        if self.speed and self.baseline is None:
            raise ConfigError("there is nothing to compare the speed with", where="--speed", fix="give --baseline")
        if self.speed and self.cache_dtype is not None:
            raise ConfigError(
                "a simulated cache says nothing about speed",
                where="--cache-dtype",
                fix="measure --speed in a run of its own, without --cache-dtype",
            )
        for name, parent in _ONLY_WITH.items():
            if not getattr(self, parent) and getattr(self, name) != type(self).model_fields[name].default:
                option = f"--{name}".replace("_", "-")
                raise ConfigError(
                    f"is for --{parent}, which is not given",
                    where=option,
                    fix=f"give --{parent}, or leave {option} out",
                )
        return self

    @property
    def step(self) -> int:
        """Tokens from one window's begin to the next."""
        return self.sequence_length if self.stride is None else self.stride
