"""Default generation parameters, for layouts whose config.json is not the source's."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import GenerationConfig

from headfuse.errors import CheckpointError

FILE = "generation_config.json"


def generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config that transformers derives from config.json; None if the folder has a file for it.

    Raises:
        CheckpointError: for values that transformers refuses.
    """
    try:
        try:
            GenerationConfig.from_pretrained(folder)
            return None
        except OSError:  # missing or no JSON: transformers takes config.json in both cases
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return GenerationConfig.from_model_config(raw.get("source_config") or raw)
    except Exception as error:  # its checks raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"generation parameters are not valid: {reason}",
            where=folder,
            fix=f"correct them in {FILE}, or in config.json where there is none",
        ) from None


def write_generation_config(source: Path, target: Path) -> None:
    """Write into `target` the generation parameters that are only in the config.json of `source`."""
    config = generation_config(source)
    if config is not None:
        (target / FILE).write_text(config.to_json_string(), encoding="utf-8")
