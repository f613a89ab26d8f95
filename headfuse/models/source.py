"""An opened source model: its config, heads, weight files and calibration text."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from headfuse.checkpoint.finish import check_companions
from headfuse.checkpoint.folder import resolve_model
from headfuse.checkpoint.generation import generation_config
from headfuse.checkpoint.hub import folder_name, repository_of
from headfuse.checkpoint.reader import Checkpoint
from headfuse.config.fuse import CalibrationConfig
from headfuse.errors import CheckpointError, ConfigError
from headfuse.models.config import raw_config, read_config
from headfuse.models.families import architecture_of
from headfuse.models.heads import head_layout
from headfuse.models.loading import check_tokens, load_tokenizer, unembedded_tokens, warn_of_unembedded
from headfuse.models.weights import ModelWeights, model_names, untie
from headfuse.plan import HeadLayout, SourceModel
from headfuse.text.bos import start_token
from headfuse.text.calibration import CalibrationText
from headfuse.text.documents import read_documents
from headfuse.text.random_tokens import ordinary_tokens, random_windows
from headfuse.text.windows import varied_windows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An opened source model."""

    name: str
    folder: Path
    checkpoint: Checkpoint
    config: Any
    heads: HeadLayout
    untied: bool = False
    """As in `weights.ModelWeights`; `config` and `raw_config` say it, too."""
    trust_remote_code: bool = False

    @classmethod
    def open(cls, model: str, trust_remote_code: bool = False) -> Source:
        """Open and check a source model: config, family, weight files."""
        folder = resolve_model(model)
        config = read_config(folder, trust_remote_code)
        check_companions(folder)  # before any work
        generation_config(folder)
        heads, checkpoint = head_layout(config, folder / "config.json"), Checkpoint(folder)
        _check_heads(checkpoint, heads, config)
        weights = ModelWeights.choose(checkpoint, config)
        weights.report()
        if weights.untied:
            config.tie_word_embeddings = False
        return cls(folder_name(folder), folder, checkpoint, config, heads, weights.untied, trust_remote_code)

    def identity(self) -> SourceModel:
        """Name, revision and content hash, as plan.json knows the source (reads every weight that was not read)."""
        repository = repository_of(self.folder)
        revision = None if repository is None else repository.revision
        return SourceModel(name=self.name, revision=revision, fingerprint=self.checkpoint.fingerprint())

    def raw_config(self) -> dict[str, Any]:
        """config.json for the output: see `checkpoint.raw_config`; without ties that are none."""
        raw = raw_config(self.folder)
        return untie(raw) if self.untied else raw

    def calibration_text(
        self, calibration: CalibrationConfig, seed: int, trust_remote_code: bool = False
    ) -> CalibrationText:
        """The calibration text as token windows.

        Raises:
            DataError: for text that is missing or too short, or has tokens that the model does not embed.
            ConfigError: for windows longer than the model's positions.
            CheckpointError: for a tokenizer that does not load.
        """
        tokenizer = load_tokenizer(self.folder, trust_remote_code)
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit and calibration.sequence_length > limit:
            raise ConfigError(
                f"{calibration.sequence_length} is longer than the model's {limit} positions",
                where="--sequence-length",
                fix=f"choose {limit} or less",
            )
        documents = read_documents(calibration.data, seed=seed, tokenizer=tokenizer)
        length, samples = calibration.sequence_length, calibration.samples
        windows = varied_windows(documents, tokenizer, length, samples, seed, required=2, where=calibration.data)
        if len(windows) < samples:
            logger.warning("The text holds %d windows, fewer than the %d that were asked for.", len(windows), samples)
        beyond = unembedded_tokens(tokenizer, self.config.vocab_size)
        warn_of_unembedded(beyond, self.folder)
        check_tokens(windows, beyond, self.folder)
        held_out, bos = calibration.held_out_windows(len(windows)), start_token(tokenizer)
        logger.info("calibration windows %s", "have no BOS" if bos is None else "begin with BOS")
        random = calibration.random_windows * len(windows) // samples  # fewer beside a short text
        text = CalibrationText.split(windows, held_out, bos)
        if not random:
            return text
        drawn = random_windows(random, length, ordinary_tokens(tokenizer, beyond), bos, seed)
        return replace(text, random=drawn)


def _check_heads(checkpoint: Checkpoint, heads: HeadLayout, config: PreTrainedConfig) -> None:
    """Compare the layers and heads of config.json with the weights, before anything is planned.

    A wrong count may mean millions of layers, and a budget for them would fill the memory.
    """
    arch, stored, problem = architecture_of(heads.model_type), 0, None
    names, _ = model_names(checkpoint, arch, config)
    shapes = {name: checkpoint.shapes[own] for own, name in names.items()}
    while any(name.startswith(arch.layer_prefix(stored) + ".") for name in shapes):
        stored += 1
    if stored != heads.num_hidden_layers:
        problem = f"the weights have {stored} layers, config.json says {heads.num_hidden_layers}"
    queries, pairs = heads.num_attention_heads, heads.num_key_value_heads
    separate = {arch.query: queries, arch.key: pairs}
    for projection, count in separate.items() if arch.packed is None else [(arch.packed, queries + 2 * pairs)]:
        name = f"{arch.attention_prefix(0)}.{projection}.weight"
        shape = list(shapes.get(name, []))
        if problem is None and shape and shape[-1 if arch.transposed else 0] != count * heads.head_dim:
            problem = f"tensor {name} has shape {shape}, config.json makes it {count} heads of {heads.head_dim}"
    if problem:
        raise CheckpointError(
            problem,
            where=checkpoint.folder,
            fix="config.json and the weights do not belong together: restore both from one source",
        )
