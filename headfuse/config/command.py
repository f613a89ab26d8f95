"""The options of each command: one name each in YAML, on the command line and in Python."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from headfuse.config.evaluate import EvalConfig
from headfuse.config.fuse import FuseConfig
from headfuse.config.loading import Options, OptionsT, load_options
from headfuse.config.machine import FusingMachine, Machine, MachineT, Processor, TrainingMachine
from headfuse.config.uptrain import UptrainConfig
from headfuse.errors import ConfigError


@dataclass(frozen=True)
class Command(Generic[OptionsT, MachineT]):
    """The named options of a command and of the Python function behind it."""

    options: type[OptionsT]
    """What decides the result; the keys of YAML."""
    machine: type[MachineT]
    """Options of where and how to compute; they are not part of YAML."""
    arguments: tuple[str, ...]
    """The function's other arguments, suggested for a misspelt name."""
    folder: str = ""
    """The folder of `configs/` that holds the packaged ones."""
    fix: str = "docs/reference/options.md has every key"
    short: Mapping[str, str] = field(default_factory=dict)
    """Options that YAML keeps in a section: name -> dotted key."""

    @property
    def names(self) -> frozenset[str]:
        """Every option by the name that the command line and Python give it."""
        return frozenset({*self.options.model_fields, *self.machine.model_fields, *self.short})

    def read(self, config: OptionsT | str | Path | None, given: Mapping[str, Any]) -> tuple[OptionsT, MachineT]:
        """Combine a config with options given by name; given options win, and None counts as not given.

        Args:
            config: a YAML file, the name of a packaged config, or options that were read before.
            given: option -> value; a section of YAML may be a mapping of some of its keys.

        Raises:
            ConfigError: naming every problem; an unknown name with the near one.
        """
        unknown = [name for name in given if name not in self.names]
        if unknown:
            raise ConfigError("; ".join(map(self._unknown, unknown)), where="options", fix=self.fix)
        machine = {name: value for name, value in given.items() if name in self.machine.model_fields}
        others = {name: value for name, value in given.items() if name not in machine}
        options = load_options(self.options, config, self._by_key(others), self.folder, self.fix)
        return options, load_options(self.machine, None, machine)

    def _by_key(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options by the keys of YAML, where an option of its own wins over one inside a section."""
        sections, options = dict[str, Any](), dict[str, Any]()
        for name, value in given.items():
            section = self._section(name)
            if section is not None and isinstance(value, section):
                value = value.model_dump(exclude_unset=True)
            if section is not None and isinstance(value, Mapping):
                sections |= {f"{name}.{key}": inner for key, inner in value.items()}
            else:
                options[self.short.get(name, name)] = value
        return sections | {key: value for key, value in options.items() if value is not None}

    def _section(self, name: str) -> type[Options] | None:
        """The type of the section of YAML that has this name."""
        kind = self.options.model_fields[name].annotation if name in self.options.model_fields else None
        return kind if isinstance(kind, type) and issubclass(kind, Options) else None

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, sorted({*self.names, *self.arguments}), 1)
        return f"{name}: unknown key, " + (
            f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(self.names))}"
        )


FUSE = Command(
    FuseConfig,
    FusingMachine,
    ("config", "output", "plan", "overwrite", "resume", "on_progress"),
    short={
        "budget": "budget.total",
        "allocator": "budget.allocator",
        "head_dim": "budget.head_dim",
        "cross_layer": "budget.cross_layer",
        "data": "calibration.data",
        "samples": "calibration.samples",
        "sequence_length": "calibration.sequence_length",
        "random_tokens": "calibration.random_tokens",
    },
)
ANALYZE = Command(
    FuseConfig,
    Processor,
    ("config", "curves", "spectrum", "on_progress"),
    short={name: path for name, path in FUSE.short.items() if name != "random_tokens"},  # plans are made on text
)
UPTRAIN = Command(
    UptrainConfig,
    TrainingMachine,
    ("config", "teacher", "output", "overwrite", "resume", "on_progress"),
    folder="recipes",
)
EVALUATE = Command(EvalConfig, Machine, ("config", "on_stage"), folder="evaluations", fix="see `headfuse eval --help`")
