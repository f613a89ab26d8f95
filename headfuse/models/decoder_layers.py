"""Decoder layers, one in memory at a time, run forwards and backwards with stored or given weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from headfuse.checkpoint.background import ReadAhead
from headfuse.checkpoint.reader import Checkpoint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.modeling.modeling_cross_layer import SharingAttention
from headfuse.modeling.modeling_headfuse import HeadfuseAttention
from headfuse.modeling.modeling_shared_states import States
from headfuse.models.attention import module_tensors
from headfuse.models.canonical import CanonicalCheckpoint
from headfuse.models.capture import CAPTURE
from headfuse.models.config import config_of
from headfuse.models.families import Architecture
from headfuse.models.placement import Copies, batch_windows


@dataclass(frozen=True)
class HiddenStates:
    """Windows of one length on their way through the layers.

    `hidden [n, T, D]`; `args` and `kwargs` hold each layer's mask and positions; `weight` as in AttentionCapture;
    `shared`: keys and values `[n, 1, T, w]` that layers have cached and later ones will read, by layer.
    """

    hidden: torch.Tensor
    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]
    weight: float = 1.0
    shared: dict[int, States] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    def split(self, size: int) -> Iterator[HiddenStates]:
        """Batches of so many windows."""
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            shared = {layer: (key[part], value[part]) for layer, (key, value) in self.shared.items()}
            yield replace(self, hidden=self.hidden[part], shared=shared)


def load_layer(
    layer: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    arch: Architecture,
    copies: Copies,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Give a layer on the meta device its stored tensors (names relative to it), in float32.

    Matrices beside the attention that are stored in what the layer multiplies in stay so: autocast would round them
    to the same numbers again.
    """
    held = module_tensors({name: copies(tensor) for name, tensor in tensors.items()}, arch)
    linear = {f"{name}.weight" for name, module in layer.named_modules() if type(module) is nn.Linear}
    stay = {name for name in linear if not name.startswith(f"{arch.attention}.")}
    held = {name: x if name in stay and x.dtype == compute_dtype else x.to(torch.float32) for name, x in held.items()}
    layer.load_state_dict(held, assign=True)


def compute_buffers(model: PreTrainedModel, modules: Iterable[nn.Module], device: torch.device) -> None:
    """Fill the buffers that are computed, not stored, such as rotary tables, as transformers does after loading."""
    for module in modules:
        buffers = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if buffers:
            for name, buffer in buffers:
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
            for parameter in module.parameters():  # those of its parts, too: gpt2 draws projections of the attention
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else it would be drawn anew
            model._init_weights(module)


class DecoderLayers:
    """The decoder layers of a model, one in memory at a time, computed in float32: a source or a fused model.

    Args:
        model: the model, its layers on the meta device.
        arch: the family's table entry.
        weights: the checkpoint that holds the layers, or that is being written.
        device: where layers are computed.
        batch_tokens: tokens that go through a layer at once; one window where it is longer.
        compute_dtype: what layers multiply in, by torch.autocast where it is not float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Architecture,
        weights: Checkpoint | CanonicalCheckpoint | SafetensorsWriter,
        device: torch.device,
        batch_tokens: int = 1,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.arch, self.weights, self.device, self.batch_tokens = arch, weights, device, batch_tokens
        self.compute_dtype, self.copies = compute_dtype, Copies(device)
        self._computed: dict[int, list[dict[str, torch.Tensor | None]]] = {}
        self.kept: dict[str, torch.Tensor] | None = None
        """Copies of layers' tensors that stay on the device, by full name; None if none stay."""
        self.rotary: nn.Module | None = None
        """The module that computes positions, if heads have another width; by default positions come with the hidden
        states.
        """
        layers = model.config.get_text_config().num_hidden_layers
        self._read = ReadAhead(self._stored, layers, ahead=device.type != "cpu")
        self.modules: list[nn.Module] = [model.get_submodule(arch.layer_prefix(i)) for i in range(layers)]

    @classmethod
    def of_config(
        cls,
        config: Mapping[str, Any],
        arch: Architecture,
        weights: Checkpoint | CanonicalCheckpoint | SafetensorsWriter,
        beside: DecoderLayers,
    ) -> DecoderLayers:
        """The layers of the model that a config.json describes, placed as those `beside` them, with shared copies."""
        described = config_of(config)
        with torch.device("meta"):
            attention = "eager" if arch.legacy else CAPTURE
            model = AutoModelForCausalLM.from_config(described, attn_implementation=attention, dtype=torch.float32)
        model.config._attn_implementation = CAPTURE
        together = 1 if beside.device.type == "cpu" else beside.batch_tokens
        layers = cls(model, arch, weights, beside.device, together, beside.compute_dtype)
        layers.copies, layers.kept = beside.copies, None if beside.kept is None else {}
        return layers

    def with_own_positions(self) -> DecoderLayers:
        """These layers, with the rotary table of their own config instead of the one that hidden states come with."""
        rotary = self.model.base_model.get_submodule("rotary_emb")
        compute_buffers(self.model, [rotary], self.device)
        self.rotary = rotary
        return self

    def __len__(self) -> int:
        return len(self.modules)

    def attention_weights(self, layers: Iterable[int]) -> list[str]:
        """Names of the attention weights of some layers."""
        prefixes = tuple(f"{self.arch.attention_prefix(i)}." for i in layers)
        return [name for name in self.weights.shapes if name.startswith(prefixes)]

    def tensors(self, layer_idx: int, others: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """A layer's tensors, names relative to the layer: those of `others`, by full name, else as they are stored."""
        prefix, others = self.arch.layer_prefix(layer_idx) + ".", others or {}
        return {
            name.removeprefix(prefix): others[name] if name in others else self.tensor(name)
            for name in self.weights.shapes
            if name.startswith(prefix)
        }

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor: its copy on the device if there is one, else as it is stored."""
        if self.kept is not None and name in self.kept:
            return self.kept[name]
        tensor = self.weights.read(name)
        self.keep({name: tensor})
        return tensor

    def stored(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """A layer's tensors as they are stored, on the host; names relative to the layer."""
        prefix, tensors, kept = self.arch.layer_prefix(layer_idx) + ".", self._read(layer_idx), self.kept or {}
        for name in tensors.keys() & kept.keys():
            self.copies.adopt(tensors[name], kept[name])
        self.keep(tensors)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _stored(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """A layer's tensors as they are stored, by full name."""
        prefix = self.arch.layer_prefix(layer_idx) + "."
        return {name: self.weights.read(name) for name in self.weights.shapes if name.startswith(prefix)}

    def keep(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let tensors, by full name, stay on the device where layers do."""
        if self.kept is not None:
            self.kept.update({name: self.copies(tensor) for name, tensor in tensors.items()})

    @contextlib.contextmanager
    def loaded(self, layer_idx: int, tensors: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
        """One layer's module on the device, with the given tensors (names relative to it), while the block runs."""
        module = self.modules[layer_idx]
        for part, buffers in zip(module.modules(), self._computed.get(layer_idx, ()), strict=False):
            part._buffers.update(buffers)
        load_layer(module, tensors, self.arch, self.copies, self.compute_dtype)
        if layer_idx not in self._computed:
            self._compute(layer_idx)
        try:
            yield module
        finally:
            module.to("meta")

    def _compute(self, layer_idx: int) -> None:
        """Fill the buffers of a layer that are not stored, and keep them for its next uses."""
        module = self.modules[layer_idx]
        compute_buffers(self.model, module.modules(), self.device)
        for part in module.modules():
            if isinstance(part, HeadfuseAttention):
                part.reset_tables()
        self._computed[layer_idx] = [
            {name: part._buffers[name] for name in part._non_persistent_buffers_set} for part in module.modules()
        ]

    @torch.no_grad()
    def through(self, module: nn.Module, layer_idx: int, states: HiddenStates) -> HiddenStates:
        """Run hidden states through a loaded layer."""
        if not len(states):
            return states
        together = batch_windows(self.device, len(states), states.hidden.shape[1], self.batch_tokens)
        outputs, shared = list[torch.Tensor](), list[dict[int, States]]()
        for batch in states.split(together):
            outputs.append(self._output(module, batch, layer_idx))
            shared.append(self._shared(module, batch, layer_idx))
        joined = {
            layer: (torch.cat([each[layer][0] for each in shared]), torch.cat([each[layer][1] for each in shared]))
            for layer in shared[0]
        }
        return replace(states, hidden=torch.cat(outputs), shared=joined)

    def run(
        self, layer_idx: int, states: HiddenStates, weights: Mapping[str, torch.Tensor] | None = None
    ) -> HiddenStates:
        """Run hidden states through one layer, with the stored weights or, by full name, with others in their place."""
        with self.loaded(layer_idx, self.tensors(layer_idx, weights)) as module:
            return self.through(module, layer_idx, states)

    def forward(self, states: HiddenStates, weights: Mapping[str, torch.Tensor] | None = None) -> list[HiddenStates]:
        """The input of every layer, then the output of the last one, from the input `states` of the first one."""
        reached = [states]
        for layer_idx in range(len(self)):
            reached.append(self.run(layer_idx, reached[-1], weights))
        return reached

    def backward(
        self,
        layer_idx: int,
        states: HiddenStates,
        gradient: torch.Tensor,
        weights: Mapping[str, torch.Tensor],
        of_shared: dict[int, list[torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """From the gradient at a layer's output to those at its input `states` and, by full name, at `weights`.

        `of_shared` holds the gradients at the keys and values that later layers read of this one and of earlier ones.
        """
        of_shared = {} if of_shared is None else of_shared
        hidden, gradients = states.hidden.detach().requires_grad_(True), dict[str, torch.Tensor]()
        read = {i: [x.detach().requires_grad_(True) for x in pair] for i, pair in states.shared.items()}
        states = replace(states, hidden=hidden, shared={i: (k, v) for i, (k, v) in read.items()})
        with self.loaded(layer_idx, self.tensors(layer_idx, weights)) as layer:
            for name, parameter in layer.named_parameters(prefix=self.arch.layer_prefix(layer_idx)):
                parameter.requires_grad_(name in weights)
            output = self._output(layer, states, layer_idx)
            cached = self._shared(layer, states, layer_idx).get(layer_idx, ())
            later = zip(cached, of_shared.pop(layer_idx, ()), strict=True) if cached else ()
            pairs = [(output, gradient), *((x, of_x) for x, of_x in later if x.requires_grad)]
            torch.autograd.backward([x for x, _ in pairs], [of_x for _, of_x in pairs])
            for name, parameter in layer.named_parameters(prefix=self.arch.layer_prefix(layer_idx)):
                if parameter.grad is not None:
                    gradients[name], parameter.grad = parameter.grad, None
        for i, pair in read.items():
            sums = of_shared.setdefault(i, [torch.zeros_like(x) for x in pair])
            for of_x, x in zip(sums, pair, strict=True):
                of_x.add_(0 if x.grad is None else x.grad)
        assert hidden.grad is not None
        return hidden.grad, gradients

    def _shared(self, layer: nn.Module, states: HiddenStates, layer_idx: int) -> dict[int, States]:
        """What later layers read of the states that this layer and those before it have cached."""
        attention = layer.get_submodule(self.arch.attention)
        if not isinstance(attention, SharingAttention):
            return {}
        own = {layer_idx: attention.shared.of(layer_idx)} if attention.is_read else {}
        found = {**states.shared, **own}
        attention.shared.clear()
        return {i: pair for i, pair in found.items() if attention.config.is_read(i, layer_idx)}

    def _output(self, layer: nn.Module, states: HiddenStates, layer_idx: int) -> torch.Tensor:
        hidden, kwargs = states.hidden, states.kwargs[layer_idx]
        attention = layer.get_submodule(self.arch.attention)
        if isinstance(attention, SharingAttention):
            attention.shared.update(states.shared)
        if self.rotary is not None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            kwargs = {**kwargs, "position_embeddings": self.rotary(hidden, positions)}
        narrower = self.compute_dtype != torch.float32
        with torch.autocast(self.device.type, self.compute_dtype, enabled=narrower):
            result = layer(hidden, *states.args[layer_idx], **kwargs)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output.float()
