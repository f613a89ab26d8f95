"""Whole models and tokenizers, through transformers, with headfuse's errors."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from headfuse.checkpoint.folder import resolve_model
from headfuse.checkpoint.hub import folder_name
from headfuse.checkpoint.reader import DTYPE_NAMES, Checkpoint
from headfuse.errors import CheckpointError, ConfigError, DataError
from headfuse.models.config import needs_code, read_config
from headfuse.models.model_code import warn_of_other_code


def model_without_weights(config: PreTrainedConfig, folder: Path, attention: str = "sdpa") -> PreTrainedModel:
    """The model of a config, on the meta device.

    Raises:
        CheckpointError: when there is none.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    except Exception as error:  # a field that no check of transformers caught, such as an unknown activation
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"describes no model that can be built ({reason})",
            where=folder / "config.json",
            fix="use the config.json that came with the model",
        ) from None
    return model.eval()


logger = logging.getLogger(__name__)
_LAYER = re.compile(r".*\b(?:layers|h)\.(\d+)\.(?!.*\b(?:layers|h)\.\d+\.)")


def pick_device(name: str = "auto") -> torch.device:
    """The device of an option `--device auto|cpu|cuda|mps`.

    Raises:
        ConfigError: when this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{name!r} is not available ({reason})", where="--device", fix="use auto or cpu") from None


def load_model(
    folder: str | Path, *, device: str = "auto", dtype: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model, fused or not, for evaluation.

    Args:
        folder: model folder or hub id.
        device: `auto`, `cpu`, `cuda` or `mps`.
        dtype: `float32`, `float16` or `bfloat16`; by default float32 on a CPU, the stored dtype elsewhere.
        trust_remote_code: allow a source's own code; decoupled folders of headfuse do not need it.

    Raises:
        CheckpointError: for a folder that is missing, damaged, or does not match its config.
    """
    import headfuse.modeling  # noqa: F401  registers decoupled models

    path = resolve_model(str(folder))
    config = read_config(path, trust_remote_code)
    warn_of_other_code(path)
    checkpoint = Checkpoint(path)  # an error of ours for what is damaged
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    target = pick_device(device)
    wanted: Any = DTYPE_NAMES[dtype] if dtype else loaded_dtype(checkpoint, target.type)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=wanted, output_loading_info=True,
            attn_implementation="eager" if capped else None,  # sdpa, which transformers 5.16 takes, leaves the cap out
            trust_remote_code=needs_code(config.model_type, trust_remote_code),
        )  # fmt: skip
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # configs and weights that do not fit raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"cannot be loaded: {reason}", where=folder, fix="the files do not belong together"
        ) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]} is missing ({len(missing)} in all)",
            where=folder,
            fix="the weights do not match config.json",
        )
    unexpected, layers = sorted(report["unexpected_keys"]), model.config.get_text_config().num_hidden_layers
    beyond = [name for name in unexpected if (match := _LAYER.match(name)) and int(match[1]) >= layers]
    if beyond:  # transformers would leave these layers out with a warning
        raise CheckpointError(
            f"tensor {beyond[0]} is not in the model of config.json ({len(beyond)} in all)",
            where=folder,
            fix="the weights do not match config.json",
        )
    return model.to(target).eval()


def loaded_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype | str:
    """The default dtype of a loaded model: float32 on a CPU, elsewhere the stored one, whatever config.json says.

    Where several are stored, `auto`: what transformers takes.
    """
    if device == "cpu":
        return torch.float32
    stored = {kind for kind in checkpoint.dtypes.values() if kind.is_floating_point}
    return stored.pop() if len(stored) == 1 else "auto"


def stored_names(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A loaded model's weights under the names, and in the shapes, that they have on the disk: experts one by one."""
    return revert_weight_conversion(model, dict(weights))


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises:
        CheckpointError: when there is none that loads.
    """
    path = resolve_model(str(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer("text", add_special_tokens=False, verbose=False)  # some faults show only at work
        return tokenizer
    except Exception as error:  # tokenizer backends raise many kinds
        reason = " ".join(str(error).split())[:300]
        fix = "copy the tokenizer files of the model"
        if not trust_remote_code and names_code(path):
            fix = "it has code of its own: pass --trust-remote-code if you trust that"
        raise CheckpointError(f"the tokenizer cannot be loaded: {reason}", where=folder, fix=fix) from None


def names_code(folder: Path) -> bool:
    """Whether the tokenizer of a folder has code of its own, beside stock classes or without one."""
    try:
        return "auto_map" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def unembedded_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[int, str]:
    """The tokens, by id, for which a model with this many embedding rows has no embedding."""
    return {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}


def warn_of_unembedded(beyond: Mapping[int, str], folder: str | Path) -> None:
    """Warn of tokens without an embedding: many fine-tunes add such a padding token, and work on text without it."""
    if beyond:
        logger.warning(
            "%s: the model does not embed %d of the tokenizer's tokens, such as %r; text without them works",
            Path(folder).resolve().name, len(beyond), beyond[min(beyond)],
        )  # fmt: skip


def check_tokens(tokens: torch.Tensor, beyond: Mapping[int, str], where: object) -> None:
    """Raise DataError, naming it, for the first of `tokens`, of any shape, that is not embedded."""
    if not beyond or int(tokens.max()) < min(beyond):
        return
    index = next(index for index in tokens.flatten().tolist() if index >= min(beyond))
    raise DataError(
        f"the text has the token {beyond.get(index, '?')!r} (id {index:,}), which the model does not embed",
        where=where,
        fix="leave this token out of the text, or restore the tokenizer files that came with the model",
    )


def guard_embeddings(model: PreTrainedModel, beyond: Mapping[int, str], folder: str | Path) -> None:
    """Make a model raise an error that names the token when it gets a token `beyond` its embeddings."""

    def check(module: Any, args: tuple[Any, ...]) -> None:
        check_tokens(args[0], beyond, folder)

    if beyond:
        model.get_input_embeddings().register_forward_pre_hook(check)


def check_context(config: PreTrainedConfig, sequence_length: int, where: str = "--sequence-length") -> None:
    """Raise ConfigError when windows are longer than the model's context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and sequence_length > context:
        raise ConfigError(
            f"{sequence_length} is more than the model's context of {context} tokens",
            where=where,
            fix=f"give at most {context}",
        )


def model_name(model: str) -> str:
    """The name of a model for an output: the hub id as given, or the folder's name without its path."""
    return folder_name(Path(model)) if Path(model).is_dir() else model
