"""YAML -> frozen, typed config: strict, and all problems in one message."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from headfuse.budget import ALLOCATORS, BudgetRules, parse_budget
from headfuse.errors import ConfigError
from headfuse.grouping import GROUPERS
from headfuse.plan import Layout, problem_words
from headfuse.presets import PRESETS

METHODS = ("mean", "first", "align", "subspace", "dha")
"""The names in FUSION_METHODS, written out because that table needs torch."""


def one_of(*names: str) -> AfterValidator:
    """What checks that a name is one of these, and says which is near."""

    def check(value: str) -> str:
        if value not in names:
            near = difflib.get_close_matches(value, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{value!r} is unknown; {hint}choose from {', '.join(names)}")
        return value

    return AfterValidator(check)


def _budget_text(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = repr(value)
    if isinstance(value, str):
        parse_budget(value)
    elif not isinstance(value, dict):  # {key: .., value: ..} is another way to say it
        raise ValueError("give a share such as 0.25 or 1/4, or {key: 1/4, value: 1/8}")
    return value


Share = Annotated[str, BeforeValidator(_budget_text)]
Count = Annotated[int, Field(ge=1, strict=True)]


class Strict(BaseModel):
    """Options that know no other keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SideBudget(Strict):
    """Separate budgets for keys and for values."""

    key: Share
    value: Share


class BudgetConfig(Strict):
    """How much of the KV cache is kept, and who decides where."""

    total: Share | SideBudget | None = "0.25"
    key_heads: tuple[Count, ...] | None = None
    value_heads: tuple[Count, ...] | None = None
    keep_layers: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()
    min_key_heads: Count = 1
    min_value_heads: Count = 1
    allocator: Annotated[str, one_of(*ALLOCATORS)] = "sensitivity"
    layerwise: bool = False

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> BudgetConfig:
        explicit = self.key_heads is not None and self.value_heads is not None
        if explicit and self.total is not None and "total" in self.model_fields_set:
            raise ValueError("give either total or key_heads and value_heads, not both")
        if self.total is None and not explicit:
            raise ValueError("without total, both key_heads and value_heads are needed")
        if isinstance(self.total, SideBudget) and (self.key_heads is not None or self.value_heads is not None):
            raise ValueError("key and value totals do not go with key_heads or value_heads")
        return self

    @property
    def rules(self) -> BudgetRules:
        """These options as the allocators take them."""
        total: Fraction | tuple[Fraction, Fraction] | None = None
        if isinstance(self.total, SideBudget):
            total = Fraction(self.total.key), Fraction(self.total.value)
        elif self.total is not None and (self.key_heads is None or self.value_heads is None):
            total = Fraction(self.total)
        return BudgetRules(
            total,
            self.key_heads,
            self.value_heads,
            self.keep_layers,
            self.min_key_heads,
            self.min_value_heads,
            self.layerwise,
        )

    @property
    def label(self) -> str:
        """A short name of the budget, for folders and plans."""
        if self.rules.total is None:
            return "custom"
        if isinstance(self.total, SideBudget):
            return f"{self.total.key}-{self.total.value}".replace("/", "-")
        return str(self.total).replace("/", "-")


HELD_OUT_WINDOWS = 8
"""Enough to compare two stages window by window; the other windows are worth more where something learns from them."""


class CalibrationConfig(Strict):
    """The text that statistics are taken on."""

    data: str = "default"
    samples: Annotated[int, Field(ge=2, strict=True)] = 64
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 512
    held_out: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the windows that nothing is fitted to; None: a quarter, at most `HELD_OUT_WINDOWS`."""

    def held_out_windows(self, samples: int) -> int:
        """How many of `samples` windows are held out; at least one is left."""
        windows = min(round(samples / 4), HELD_OUT_WINDOWS) if self.held_out is None else round(samples * self.held_out)
        return min(windows, samples - 1)


Rate = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=0, strict=True)]


class DhaConfig(Strict):
    """The trainings of `method: dha`; defaults are the paper's where it tells them (docs/dha.md)."""

    search_steps: Steps = 240
    fusion_steps: Steps = 1000
    """At most, over all rounds."""
    progressive: bool = True
    """Rounds that halve the heads; else one round to the final groups."""
    b: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Base of the decaying target of the fusion loss."""
    k: Count | None = None
    """Steps of a round until that target is zero; by default half of the round."""
    stop: Annotated[float, Field(ge=0)] = 1e-3
    """The fusion loss at which a round ends."""
    raw_fusion_loss: bool = False
    """The paper's sum over channels, pairs, groups and layers, instead of the mean."""
    loss: Annotated[str, one_of("ce", "kl")] = "ce"
    start: Annotated[str, one_of("raw", "align", "subspace")] = "raw"
    """The basis in which heads are mixed: their own, or that of another method's maps."""
    learning_rate: Rate = 1e-4
    omega_learning_rate: Rate = 1e-2
    lambda_learning_rate: Rate = 1e-2
    lambda_start: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Count = 64
    micro_batch_size: Count = 8
    """Windows in a forward pass."""
    checkpoint_every: Count = 100


class FuseConfig(Strict):
    """Every option of `headfuse fuse`."""

    budget: BudgetConfig = BudgetConfig()
    method: Annotated[str, one_of(*METHODS)] = "subspace"
    grouping: Annotated[str, one_of(*GROUPERS)] = "cluster"
    layout: Layout = "decoupled"
    preset: Annotated[str, one_of(*PRESETS)] = "balanced"
    calibration: CalibrationConfig = CalibrationConfig()
    dha: DhaConfig = DhaConfig()
    seed: Annotated[int, Field(ge=0, strict=True)] = 0

    @model_validator(mode="before")
    @classmethod
    def _as_the_paper(cls, raw: Any) -> Any:
        """Method dha has its own allocator and grouping where none are given."""
        if not isinstance(raw, dict) or raw.get("method") != "dha":
            return raw
        budget = raw.get("budget") or {}
        if isinstance(budget, BudgetConfig):
            budget = budget.model_dump(exclude_unset=True)
        if isinstance(budget, dict):
            budget = {"allocator": "dha-greedy", **budget}
        return {"grouping": "anneal", **raw, "budget": budget}

    @model_validator(mode="after")
    def _dha_is_decoupled(self) -> FuseConfig:
        if self.method == "dha" and self.layout != "decoupled":
            raise ValueError(f"method dha gives keys and values heads of their own: layout {self.layout} has none")
        return self

    @property
    def rules(self) -> BudgetRules:
        """What the budget asks for and the layout allows."""
        rules = self.budget.rules
        return replace(rules, layerwise=True, equal_groups=True) if self.layout == "layerwise" else rules

    def to_yaml(self) -> str:
        """The YAML that reproduces this config; text at an absolute path is named by its file alone."""
        data = self.model_dump(mode="json", exclude_none=True)
        if Path(self.calibration.data).is_absolute():
            data["calibration"]["data"] = Path(self.calibration.data).name
        if self.budget.rules.total is None:
            data["budget"].pop("total", None)
        if self.method != "dha":
            data.pop("dha")
        return yaml.safe_dump(data, sort_keys=False)


Options = TypeVar("Options", bound=Strict)


def load_config(name: str | None, overrides: Mapping[str, Any]) -> FuseConfig:
    """The options of `headfuse fuse`: see `load_options`; a config that is packaged has a name."""
    return load_options(FuseConfig, name, overrides)


def load_options(
    model: type[Options],
    name: str | None,
    overrides: Mapping[str, Any],
    folder: str = "",
    fix: str = "see the README for every key",
) -> Options:
    """Read a YAML file, or a packaged config by name, and lay the command line over it.

    Args:
        model: what the options are.
        name: path of a YAML file, name of a packaged config, or None for the defaults.
        overrides: dotted option -> value; None values are skipped.
        folder: where in the package's data the packaged ones lie.
        fix: where a reader finds every key.

    Raises:
        ConfigError: naming every problem with its place.
    """
    raw = {} if name is None else _read_yaml(name, folder)
    for key, value in overrides.items():
        if value is None:
            continue
        *parents, last = key.split(".")
        place = raw
        for parent in parents:
            place[parent] = dict(place.get(parent) or {}) if isinstance(place.get(parent), (dict, type(None))) else {}
            place = place[parent]
        place[last] = value
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = [_describe(dict(problem), model) for problem in error.errors() if not _not_meant(problem)]
        raise ConfigError("; ".join(dict.fromkeys(problems)), where=name or "options", fix=fix) from None


def _not_meant(problem: Mapping[str, Any]) -> bool:
    """Whether a value is only said not to be of the other type: a budget is one share, or one for each side."""
    return problem["loc"][:-1] == ("budget", "total") and problem["type"] in ("string_type", "model_type")


class _UniqueKeys(yaml.SafeLoader):
    """YAML without keys that are there twice, of which the plain loader drops the first."""

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
        data = resources.files("headfuse") / "data"
        data = data / folder if folder else data
        packaged = data / f"{name}.yaml"
        if "/" in name or not packaged.is_file():
            names = sorted(p.name.removesuffix(".yaml") for p in data.iterdir() if p.name.endswith(".yaml"))
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            fix = f"{hint}give a YAML file or a packaged name: {', '.join(names)}"
            raise ConfigError("no such config", where=name or "--config", fix=fix)
        text = packaged.read_text(encoding="utf-8")
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
        raise ConfigError(f"is not valid YAML: {reason}", where=name, fix="see the README for an example") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError("must hold a mapping of options", where=name, fix="see the README for an example")
    return raw


def _describe(problem: dict[str, Any], model: type[Strict]) -> str:
    """A problem with its place; an unknown key with the near one."""
    model = SideBudget if "SideBudget" in problem["loc"] else model
    path = [str(part) for part in problem["loc"] if part not in ("SideBudget", "function-before[_budget_text(), str]")]
    place = ".".join(path)
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem_words(problem)}" if place else problem_words(problem)
    for part in [] if model is SideBudget else path[:-1]:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        model = inner if isinstance(inner, type) and issubclass(inner, Strict) else model
    known = list(model.model_fields)
    near = difflib.get_close_matches(path[-1], known, 1)
    return f"{place}: unknown key" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
