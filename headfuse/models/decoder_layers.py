"""Decoder layers, one in memory at a time, run forwards and backwards with stored or given weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headfuse.checkpoint.reader import Checkpoint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.modeling.modeling_headfuse import HeadfuseAttention
from headfuse.models.attention import module_tensors
from headfuse.models.canonical import CanonicalCheckpoint
from headfuse.models.families import Architecture


@dataclass(frozen=True)
class HiddenStates:
    """Windows of one length on their way through the layers.

    `hidden [n, T, D]`; `args` and `kwargs` hold each layer's mask and positions; `weight` as in AttentionCapture.
    """

    hidden: torch.Tensor
    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.hidden)


def load_layer(layer: nn.Module, tensors: Mapping[str, torch.Tensor], arch: Architecture, device: torch.device) -> None:
    """Give a layer on the meta device its stored tensors (names relative to it), in float32."""
    held = module_tensors(tensors, arch)
    layer.load_state_dict({name: tensor.to(device, torch.float32) for name, tensor in held.items()}, assign=True)


def compute_buffers(model: PreTrainedModel, modules: Iterable[nn.Module], device: torch.device) -> None:
    """Fill the buffers that are computed, not stored, such as rotary tables, as transformers does after loading."""
    for module in modules:
        buffers = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if buffers:
            for name, buffer in buffers:
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else it would be drawn anew
            model._init_weights(module)


class DecoderLayers:
    """The decoder layers of a fused model, one in memory at a time, computed in float32.

    Args:
        config: the fused model's config.json.
        arch: the family's table entry.
        weights: the checkpoint that holds them, or that is being written.
        device: where layers are computed.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        arch: Architecture,
        weights: Checkpoint | CanonicalCheckpoint | SafetensorsWriter,
        device: torch.device,
    ) -> None:
        fields = dict(config)
        fused = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            attention = "eager" if arch.legacy else "sdpa"
            model = AutoModelForCausalLM.from_config(fused, attn_implementation=attention, dtype=torch.float32)
        model.config._attn_implementation = "sdpa"
        self.model = model.eval().requires_grad_(False)
        self.device, self.arch, self.weights = device, arch, weights
        self.layers = [model.get_submodule(arch.layer_prefix(i)) for i in range(fused.num_hidden_layers)]

    def attention_weights(self, layers: Iterable[int]) -> list[str]:
        """Names of the attention weights of some layers."""
        prefixes = tuple(f"{self.arch.attention_prefix(i)}." for i in layers)
        return [name for name in self.weights.shapes if name.startswith(prefixes)]

    @contextlib.contextmanager
    def layer(self, layer_idx: int, weights: Mapping[str, torch.Tensor]) -> Iterator[torch.nn.Module]:
        """One layer on the device while the block runs; `weights`, by full name, replace the written ones."""
        layer, prefix = self.layers[layer_idx], f"{self.arch.layer_prefix(layer_idx)}."
        names = [name for name in self.weights.shapes if name.startswith(prefix)]
        tensors = {name: weights[name] if name in weights else self.weights.read(name) for name in names}
        load_layer(layer, {name.removeprefix(prefix): t for name, t in tensors.items()}, self.arch, self.device)
        compute_buffers(self.model, layer.modules(), self.device)
        for module in layer.modules():
            if isinstance(module, HeadfuseAttention):
                module.reset_tables()
        yield layer
        layer.to("meta")

    def run(
        self, layer_idx: int, states: HiddenStates, weights: Mapping[str, torch.Tensor] | None = None
    ) -> HiddenStates:
        """Run hidden states through one layer, with the written weights or with others in their place."""
        with self.layer(layer_idx, weights or {}) as layer, torch.no_grad():
            outputs = [_output(layer, window[None], states, layer_idx) for window in states.hidden]
        return replace(states, hidden=torch.cat(outputs))

    def backward(
        self, layer_idx: int, states: HiddenStates, gradient: torch.Tensor, weights: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """From the gradient at a layer's output to those at its input `states` and, by full name, at `weights`."""
        hidden, gradients = states.hidden.detach().requires_grad_(True), dict[str, torch.Tensor]()
        with self.layer(layer_idx, weights) as layer:
            for name, parameter in layer.named_parameters(prefix=self.arch.layer_prefix(layer_idx)):
                parameter.requires_grad_(name in weights)
            _output(layer, hidden, states, layer_idx).backward(gradient)
            for name, parameter in layer.named_parameters(prefix=self.arch.layer_prefix(layer_idx)):
                if parameter.grad is not None:
                    gradients[name], parameter.grad = parameter.grad, None
        assert hidden.grad is not None
        return hidden.grad, gradients


def _output(layer: torch.nn.Module, hidden: torch.Tensor, states: HiddenStates, layer_idx: int) -> torch.Tensor:
    result = layer(hidden, *states.args[layer_idx], **states.kwargs[layer_idx])
    output: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return output
