"""Whole models and tokenizers, through transformers, with headfuse's errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from headfuse.checkpoint import DTYPE_NAMES, Checkpoint, read_config, resolve_model
from headfuse.errors import CheckpointError, ConfigError
from headfuse.model_code import warn_of_other_code

_LAYER = re.compile(r".*\b(layers|h)\.\d+\.")


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
    Checkpoint(path)
    target = pick_device(device)
    wanted: Any = DTYPE_NAMES[dtype] if dtype else torch.float32 if target.type == "cpu" else "auto"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=wanted, trust_remote_code=trust_remote_code, output_loading_info=True
        )
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
    beyond = sorted(name for name in report["unexpected_keys"] if _LAYER.match(name))
    if beyond:  # transformers would leave these layers out with a warning
        raise CheckpointError(
            f"tensor {beyond[0]} is not in the model of config.json ({len(beyond)} in all)",
            where=folder,
            fix="the weights do not match config.json",
        )
    return model.to(target).eval()


def keep_tokenizer_class(source: Path, target: Path) -> None:
    """Name the tokenizer's class in a folder of another model type: transformers picks some by the model type."""
    path = target / "tokenizer_config.json"
    if not path.exists():
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    if "auto_map" not in fields:
        fields["tokenizer_class"] = type(load_tokenizer(source)).__name__
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


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
        raise CheckpointError(
            f"the tokenizer cannot be loaded: {reason}", where=folder, fix="copy the tokenizer files of the model"
        ) from None


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise CheckpointError when the tokenizer has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model embeds {rows:,}",
            where=folder,
            fix="restore the tokenizer files that came with the model",
        )


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
    """How an output may name a model: a hub id, or a folder's name without its path."""
    return Path(model).resolve().name if Path(model).is_dir() else model
