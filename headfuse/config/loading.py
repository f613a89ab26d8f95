"""YAML to frozen, typed options: strict, and all problems in one message."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from headfuse.config.packaged import packaged
from headfuse.config.values import Share
from headfuse.errors import ConfigError, problem_words


def one_of(*names: str) -> AfterValidator:
    """A check that a name is one of these; its error suggests the nearest."""

    def check(value: str) -> str:
        if value not in names:
            near = difflib.get_close_matches(value, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{value!r} is unknown; {hint}choose from {', '.join(names)}")
        return value

    return AfterValidator(check)


class Options(BaseModel):
    """Options that refuse unknown keys. The docstring under a field is its description in docs/reference/options.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class SideBudget(Options):
    """Separate budgets for keys and for values."""

    key: Share
    """Share of the keys' cache that is kept."""
    value: Share
    """Share of the values' cache that is kept."""


OptionsT = TypeVar("OptionsT", bound=Options)


def load_options(
    model: type[OptionsT],
    config: OptionsT | str | Path | None,
    overrides: Mapping[str, Any],
    folder: str = "",
    fix: str = "docs/reference/options.md has every key",
) -> OptionsT:
    """Read a YAML file, or a packaged config by name, and lay other options over it.

    Args:
        model: what the options are.
        config: path of a YAML file, name of a packaged config, options that were read before, or None for the defaults.
        overrides: dotted option -> value; None values are skipped.
        folder: the folder of `configs/` that holds the packaged ones.
        fix: where a reader finds every key.

    Raises:
        ConfigError: naming every problem with its place.
    """
    if isinstance(config, model) and all(value is None for value in overrides.values()):
        return config
    raw = _raw(model, config, folder, fix)
    for key, value in overrides.items():
        if value is None:
            continue
        *parents, last = key.split(".")
        place = raw
        for parent in parents:
            if not isinstance(place.get(parent), (dict, type(None))):
                break  # the validation says that it must be a mapping
            place[parent] = dict(place.get(parent) or {})
            place = place[parent]
        else:
            place[last] = value
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = [_describe(dict(problem), model) for problem in error.errors() if not _not_meant(problem)]
        where = config if isinstance(config, (str, Path)) else "options"
        raise ConfigError("; ".join(dict.fromkeys(problems)), where=where, fix=fix) from None


def _raw(model: type[Options], config: Options | str | Path | None, folder: str, fix: str) -> dict[str, Any]:
    """The options of a config, by key, that it sets itself."""
    if config is None:
        return {}
    if isinstance(config, model):
        return config.model_dump(exclude_unset=True)
    if isinstance(config, (str, Path)):
        return _read_yaml(str(config), folder)
    raise ConfigError(
        f"config is of type {type(config).__name__}",
        fix=f"give a {model.__name__}, a YAML file or a packaged name; {fix}",
    )


def _not_meant(problem: Mapping[str, Any]) -> bool:
    """Whether a problem concerns the form of budget that was not meant: one share, or one for each side."""
    return problem["loc"][:-1] == ("budget", "total") and problem["type"] in ("string_type", "model_type")


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys; the plain loader silently drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(name: str, folder: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        known = packaged(folder)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            names = f" or a packaged name: {', '.join(sorted(known))}" if known else ""
            raise ConfigError("no such config", where=name or "--config", fix=f"{hint}give a YAML file{names}")
        text = known[name].read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"cannot be read: {reason}", where=name, fix="give a YAML file in UTF-8") from None
    try:
        raw = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"is not valid YAML: {reason}", where=name, fix="see docs/reference/options.md for an example"
        ) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            "must hold a mapping of options", where=name, fix="see docs/reference/options.md for an example"
        )
    return raw


def _describe(problem: dict[str, Any], model: type[Options]) -> str:
    """A problem with its place; for an unknown key, the nearest known one."""
    model = SideBudget if "SideBudget" in problem["loc"] else model
    path = [str(part) for part in problem["loc"] if part not in ("SideBudget", "function-before[_budget_text(), str]")]
    place = ".".join(path)
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem_words(problem)}" if place else problem_words(problem)
    for part in [] if model is SideBudget else path[:-1]:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        model = inner if isinstance(inner, type) and issubclass(inner, Options) else model
    known = list(model.model_fields)
    near = difflib.get_close_matches(path[-1], known, 1)
    return f"{place}: unknown key" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
