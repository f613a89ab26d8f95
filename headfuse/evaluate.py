"""What a model predicts and what its KV cache weighs: NLL by a stated protocol, bytes per token, parameters."""

from __future__ import annotations

import gc
import logging
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from headfuse.checkpoint import Checkpoint, read_config, resolve_model
from headfuse.errors import CheckpointError, ConfigError
from headfuse.loading import load_model, load_tokenizer
from headfuse.text import DEFAULT_DATA, data_name, read_documents, token_windows

logger = logging.getLogger(__name__)

_LOGITS = 2**23
"""Logits held at once."""


@dataclass(frozen=True)
class ModelFigures:
    """The figures of one model; `nll_stderr` is the standard error over windows, None for a single window."""

    name: str
    nll: float
    nll_stderr: float | None
    perplexity: float | None
    kv_bytes_per_token: int
    kv_dtype: str
    parameters: int


@dataclass(frozen=True)
class Comparison:
    """A model against its baseline: `kv_ratio` and `ppl_ratio` are model over baseline, `nll_gap` model minus baseline.

    The standard error of the gap is that of the paired differences, window by window.
    """

    kv_ratio: float
    ppl_ratio: float | None
    nll_gap: float
    nll_gap_stderr: float | None


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured, and how."""

    model: ModelFigures
    baseline: ModelFigures | None
    comparison: Comparison | None
    data: str
    windows: int
    sequence_length: int
    predictions: int
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def evaluate(
    model: str,
    *,
    data: str = DEFAULT_DATA,
    baseline: str | None = None,
    samples: int = 24,
    sequence_length: int = 512,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    seed: int | None = None,
) -> EvaluationResult:
    """Measure a causal LM, fused or not, and compare it with a baseline.

    Args:
        model: a model folder or hub id.
        data: the text, as `text.read_documents` takes it.
        baseline: a second model, of the same tokenizer.
        samples: how many windows; fewer are taken, with a warning, where the text ends.
        sequence_length: tokens in a window.
        device: `auto`, `cpu`, `cuda` or `mps`.
        dtype: the dtype of the computation; by default float32 on a CPU.
        threads: CPU threads.
        trust_remote_code: run code that comes with the model.
        seed: shuffle the documents; by default they are read in the order of the file.

    Raises:
        HeadfuseError: for a model, baseline or text that cannot be used.
    """
    if samples < 1 or sequence_length < 2:
        raise ConfigError(
            f"{samples} samples of {sequence_length} tokens hold no prediction", fix="give 1 and 2 or more"
        )
    if data == DEFAULT_DATA:
        logger.warning("no --data: the packaged text is generic prose; give text of the kind that the model is used on")
    if threads is not None:
        torch.set_num_threads(threads)
    names = [name for name in (model, baseline) if name is not None]
    folders = [resolve_model(name) for name in names]
    for folder in folders:
        check_context(read_config(folder, trust_remote_code), sequence_length)
    tokenizers = [load_tokenizer(folder, trust_remote_code) for folder in folders]
    windows = [
        token_windows(read_documents(data, seed=seed), tokenizer, sequence_length, samples, where=data)
        for tokenizer in tokenizers
    ]
    if not torch.equal(windows[0], windows[-1]):
        raise ConfigError(
            "tokenises the text differently, so the figures per token cannot be compared",
            where=f"baseline {baseline}",
            fix="give a baseline with the model's own tokenizer, such as the source model",
        )
    if len(windows[0]) < samples:
        logger.warning("the text holds %d windows, fewer than the %d asked for", len(windows[0]), samples)

    losses, figures = [], []
    for name, folder, tokenizer in zip(names, folders, tokenizers, strict=True):
        loss, measured = _measure(name, folder, tokenizer, windows[0], device, dtype, trust_remote_code)
        losses.append(loss)
        figures.append(measured)
    return EvaluationResult(
        model=figures[0],
        baseline=figures[1] if baseline is not None else None,
        comparison=_compare(figures, losses) if baseline is not None else None,
        data=data_name(data),
        windows=len(windows[0]),
        sequence_length=sequence_length,
        predictions=len(windows[0]) * (sequence_length - 1),
        protocol=nll_protocol(len(windows[0]), sequence_length, shuffled=seed is not None),
    )


def nll_protocol(windows: int, sequence_length: int, *, shuffled: bool = False) -> str:
    """The protocol of a figure, in words."""
    order = "shuffled" if shuffled else "in file order"
    return (
        f"NLL per token in nats over the first {windows} independent, non-overlapping windows of"
        f" {sequence_length} tokens of the text as it is (documents {order}, joined by EOS), without BOS,"
        f" {sequence_length - 1} predictions in each; perplexity is its exponential"
    )


@torch.no_grad()
def nll_per_window(model: PreTrainedModel, windows: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """Mean NLL of the predictions inside each window.

    Args:
        model: a causal LM; its training mode is left as it was.
        windows: token ids `[windows, sequence_length]`.
        batch_size: windows in a forward pass; by default as many as keep the logits small.

    Returns:
        `[windows]`, float64 on the CPU.
    """
    training = model.training
    model.eval()
    batch_size = batch_size or max(1, _LOGITS // (windows.shape[1] * model.get_output_embeddings().weight.shape[0]))
    losses = []
    for batch in windows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(batch), -1).double().mean(dim=1).cpu())
    model.train(training)
    return torch.cat(losses)


def kv_bytes_per_token(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes that one token takes in the KV cache over all layers, at `itemsize` bytes a number."""
    if config.model_type == "headfuse":
        heads = sum(config.num_key_heads) + sum(config.num_value_heads)
    elif hasattr(config, "num_key_value_heads_per_layer"):  # layout layerwise
        heads = 2 * sum(config.num_key_value_heads_per_layer)
    else:
        config = config.get_text_config()
        heads = (
            2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads * head_dim * itemsize


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most numbers of the weight files have."""
    sizes: Counter[torch.dtype] = Counter()
    for name, shape in checkpoint.shapes.items():
        sizes[checkpoint.dtypes[name]] += math.prod(shape)
    return sizes.most_common(1)[0][0]


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise CheckpointError when the tokenizer has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model embeds {rows:,}",
            where=folder,
            fix="restore the tokenizer files that came with the model",
        )


def check_context(config: PreTrainedConfig, sequence_length: int) -> None:
    """Raise ConfigError when windows are longer than the model's context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and sequence_length > context:
        raise ConfigError(
            f"{sequence_length} is more than the model's context of {context} tokens",
            where="--sequence-length",
            fix=f"give at most {context}",
        )


def model_name(model: str) -> str:
    """How an output may name a model: a hub id, or a folder's name without its path."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _measure(
    name: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    device: str,
    dtype: str | None,
    trust_remote_code: bool,
) -> tuple[torch.Tensor, ModelFigures]:
    kv_dtype = stored_dtype(Checkpoint(folder))
    model = load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, folder)
    losses = nll_per_window(model, windows)
    if not torch.isfinite(losses).all():
        raise CheckpointError("the model's predictions are not finite", where=folder, fix="its weights are damaged")
    nll = losses.mean().item()
    figures = ModelFigures(
        name=model_name(name),
        nll=nll,
        nll_stderr=_stderr(losses),
        perplexity=_exp(nll),
        kv_bytes_per_token=kv_bytes_per_token(model.config, kv_dtype.itemsize),
        kv_dtype=str(kv_dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    del model
    gc.collect()
    return losses, figures


def _compare(figures: list[ModelFigures], losses: list[torch.Tensor]) -> Comparison:
    (model, baseline), gap = figures, losses[0] - losses[1]
    return Comparison(
        kv_ratio=model.kv_bytes_per_token / baseline.kv_bytes_per_token,
        ppl_ratio=_exp(gap.mean().item()),
        nll_gap=gap.mean().item(),
        nll_gap_stderr=_stderr(gap),
    )


def _stderr(values: torch.Tensor) -> float | None:
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def _exp(value: float) -> float | None:
    """The exponential, None where it is beyond a float."""
    return math.exp(value) if value < 700 else None
