"""An opened source model: its config, heads, weight files and calibration text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headfuse.architectures import architecture_of, head_layout
from headfuse.calibration import CalibrationText
from headfuse.checkpoint import Checkpoint, read_config, resolve_model
from headfuse.config import FuseConfig
from headfuse.errors import CheckpointError, ConfigError
from headfuse.generation import generation_config
from headfuse.loading import load_tokenizer
from headfuse.plan import HeadLayout, SourceModel
from headfuse.text import read_documents, varied_windows


@dataclass(frozen=True)
class Source:
    """An opened source model."""

    name: str
    folder: Path
    checkpoint: Checkpoint
    config: Any
    heads: HeadLayout

    @classmethod
    def open(cls, model: str, trust_remote_code: bool = False) -> Source:
        """Open and check a source model: config, family, weight files."""
        folder = resolve_model(model)
        config = read_config(folder, trust_remote_code)
        generation_config(folder)  # before any work
        heads, checkpoint = head_layout(config, folder / "config.json"), Checkpoint(folder)
        checkpoint.rename(architecture_of(config.model_type).model_names(checkpoint.shapes))
        _check_heads(checkpoint, heads)
        name = model if not Path(model).exists() else folder.resolve().name
        return cls(name, folder, checkpoint, config, heads)

    def identity(self) -> SourceModel:
        """Name and content hash, as plan.json knows the source (reads every weight that was not read before)."""
        return SourceModel(name=self.name, fingerprint=self.checkpoint.fingerprint())

    def raw_config(self) -> dict[str, Any]:
        """config.json as it is, but for the path that transformers may have left in it."""
        raw: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        raw.pop("_name_or_path", None)
        return raw

    def calibration_text(self, config: FuseConfig, trust_remote_code: bool = False) -> CalibrationText:
        """The calibration text of a config as token windows.

        Raises:
            DataError: for text that is missing or too short.
            ConfigError: for windows longer than the model's positions.
            CheckpointError: for a tokenizer of another model.
        """
        calibration = config.calibration
        tokenizer = load_tokenizer(self.folder, trust_remote_code)
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit and calibration.sequence_length > limit:
            raise ConfigError(
                f"{calibration.sequence_length} is longer than the model's {limit} positions",
                where="--sequence-length",
                fix=f"choose {limit} or less",
            )
        documents = read_documents(calibration.data, seed=config.seed)
        length, samples = calibration.sequence_length, calibration.samples
        windows = varied_windows(documents, tokenizer, length, samples, config.seed, required=2, where=calibration.data)
        if int(windows.max()) >= self.config.vocab_size:  # as integers: a damaged size may be beyond int64
            raise CheckpointError(
                "the tokenizer has more tokens than the model", where=self.folder, fix="use the model's own tokenizer"
            )
        return CalibrationText.split(windows, calibration.held_out_windows(len(windows)))


def _check_heads(checkpoint: Checkpoint, heads: HeadLayout) -> None:
    """Compare layers and heads of config.json with the weights, before anything is planned for them.

    A wrong count may mean millions of layers, and a budget for them would fill the memory.
    """
    arch, stored, problem = architecture_of(heads.model_type), 0, None
    while any(name.startswith(arch.layer_prefix(stored) + ".") for name in checkpoint.shapes):
        stored += 1
    if stored != heads.num_hidden_layers:
        problem = f"the weights have {stored} layers, config.json says {heads.num_hidden_layers}"
    queries, pairs = heads.num_attention_heads, heads.num_key_value_heads
    separate = {arch.query: queries, arch.key: pairs}
    for projection, count in separate.items() if arch.packed is None else [(arch.packed, queries + 2 * pairs)]:
        name = f"{arch.attention_prefix(0)}.{projection}.weight"
        shape = list(checkpoint.shapes.get(name, []))
        if problem is None and shape and shape[-1 if arch.transposed else 0] != count * heads.head_dim:
            problem = f"tensor {name} has shape {shape}, config.json makes it {count} heads of {heads.head_dim}"
    if problem:
        raise CheckpointError(
            problem,
            where=checkpoint.folder,
            fix="config.json and the weights do not belong together: restore both from one source",
        )
