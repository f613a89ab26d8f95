"""Runs a model up to its output embeddings."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class States:
    """What a model computes on a batch, `[windows, length, D]` each.

    `last` is what the head reads; `inputs` and `outputs` are those of every decoder layer, empty unless asked for.
    """

    last: torch.Tensor
    inputs: tuple[torch.Tensor, ...] = ()
    outputs: tuple[torch.Tensor, ...] = ()


def model_states(
    model: PreTrainedModel,
    batch: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    layers: bool = False,
    inputs: tuple[torch.Tensor, ...] | None = None,
) -> States:
    """Run a model without its head.

    Args:
        model: a causal language model.
        batch: token ids `[windows, length]`.
        positions: of the tokens in their documents (see `document_positions`); None for one document a window.
        layers: keep the inputs and outputs of the layers.
        inputs: what each layer reads instead of the output of the layer before it.
    """
    recording = _recorded(model, inputs) if layers or inputs is not None else contextlib.nullcontext(_Seen())
    with recording as seen:
        last = model.base_model(input_ids=batch, position_ids=positions, use_cache=False).last_hidden_state
    order = sorted(seen)
    return States(last * logit_scale(model.config), tuple(seen[i][0] for i in order), tuple(seen[i][1] for i in order))


_Seen = dict[int, tuple[torch.Tensor, torch.Tensor]]


@contextlib.contextmanager
def _recorded(model: PreTrainedModel, inputs: tuple[torch.Tensor, ...] | None) -> Iterator[_Seen]:
    seen = _Seen()
    handles = []
    for layer_idx, layer in enumerate(decoder_layers(model)):

        def replace(_: nn.Module, args: Any, kwargs: Any, layer_idx: int = layer_idx) -> Any:
            if inputs is None:
                return None
            if args:  # in the dtype of the model's own states: sharded layers have no autocast to make up for another
                return (inputs[layer_idx].to(args[0].dtype), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": inputs[layer_idx].to(kwargs["hidden_states"].dtype)}

        def record(_: nn.Module, args: Any, kwargs: Any, output: Any, layer_idx: int = layer_idx) -> None:
            read = args[0] if args else kwargs["hidden_states"]
            seen[layer_idx] = read, output[0] if isinstance(output, tuple) else output

        handles.append(layer.register_forward_pre_hook(replace, with_kwargs=True))
        handles.append(layer.register_forward_hook(record, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def cache_argument(model: nn.Module) -> str:
    """What a model calls the KV cache among its arguments: transformers 5.24 gave it another name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def logit_scale(config: PreTrainedConfig) -> float:
    """Factor on the logits of a family (cohere, granite); scaling the states that the head reads is equivalent."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    if getattr(config, "source_config", config).model_type == "hyperclovax":  # granite's name for the inverse
        scale, divisor = divisor, None
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)


def softcap(config: PreTrainedConfig) -> float | None:
    """Bound on the logits of a family (gemma2): `softcap * tanh(logits / softcap)`."""
    cap: float | None = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return cap


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits within `softcap`, where there is one."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model, whatever its family calls them."""
    count = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def document_positions(batch: torch.Tensor, eos: int) -> torch.Tensor:
    """Position of every token in its document, `[windows, length]`; EOS is the last token of a document.

    transformers makes a block-diagonal mask of positions that start anew, in every attention implementation.
    """
    index = torch.arange(batch.shape[1], device=batch.device).expand_as(batch)
    starts = F.pad(batch[:, :-1] == eos, (1, 0))
    return index - torch.where(starts, index, 0).cummax(dim=1).values
