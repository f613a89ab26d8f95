"""Runs a checkpoint one decoder layer at a time, so that a model larger than memory can be measured and converted."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from headfuse.architectures import (
    Architecture,
    architecture_of,
    canonical_order,
    head_layout,
    module_tensors,
    split_projections,
)
from headfuse.checkpoint import Checkpoint, is_finite
from headfuse.distillation import logit_scale
from headfuse.errors import CheckpointError, UnsupportedModelError
from headfuse.modeling.configuration_headfuse import HeadfuseConfig
from headfuse.plan import HeadLayout

_CAPTURE = "headfuse_capture"
BATCH_TOKENS = 512
"""Tokens that go through a layer at once; one window where it is longer."""
REUSED = 2**23
"""Bytes of the largest freed blocks that are used again: mapping each anew takes a quarter of a conversion in page
faults, and larger ones leave gaps that grow with the layers (docs/scaling.md)."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt


@dataclass(frozen=True)
class AttentionCapture:
    """What one attention layer computed for a batch of windows.

    Shapes: `query [B, n_q, T, d]`, `key` and `value [B, n_s, T, d]` (after RoPE and norms; channels of queries and keys
    in the canonical order), `output [B, T, n_q, d]` (head outputs before the output projection). `mask` is boolean
    `[1, 1, T, T]`, additive `[1, n_q, T, T]` where heads have biases, or None for plain causal attention;
    `weight` is what one token counts in the layer's statistics; `key_before_norm [B, T, n_s, d]`, where keys have one.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    weight: float = 1.0
    key_before_norm: torch.Tensor | None = None

    def attend(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Head outputs `[B, n_q, T, d]` with others in the place of the source's keys and values `[B, n_s, T, d]`."""
        return nn.functional.scaled_dot_product_attention(
            self.query,
            key,
            value,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=self.scaling,
            enable_gqa=True,  # query heads of one KV head are adjacent
        )

    def probabilities(self, key: torch.Tensor, step: int = 1) -> torch.Tensor:
        """Attention probabilities `[B, n_q, T', T]` of every `step`-th query, with `key [B, n_s, T, d]`."""
        query, length = self.query[:, :, ::step], key.shape[2]
        batch, heads, queries, d = query.shape
        grouped = query.reshape(batch, key.shape[1], -1, d)
        scores = (grouped * self.scaling @ key.mT).view(batch, heads, queries, length)
        if self.mask is not None and self.mask.dtype != torch.bool:
            return scores.add_(self.mask[:, :, ::step]).softmax(-1)
        allowed = (
            torch.ones(length, length, dtype=torch.bool, device=key.device).tril() if self.mask is None else self.mask
        )[..., ::step, :]
        hidden = torch.zeros_like(allowed, dtype=scores.dtype).masked_fill_(~allowed, float("-inf"))
        return scores.add_(hidden).softmax(-1)  # ten times as fast as filling the scores of all heads


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


class CanonicalCheckpoint:
    """A checkpoint with a projection each for queries, keys and values, and channels in the canonical order.

    Args:
        checkpoint: one whose projections are packed, head by head, or whose channels have another order, not both.
        arch: the family's table entry.
        heads: the heads.
    """

    def __init__(self, checkpoint: Checkpoint, arch: Architecture, heads: HeadLayout) -> None:
        self.checkpoint, self.folder, self.nbytes = checkpoint, checkpoint.folder, checkpoint.nbytes
        self.shapes, self.dtypes = dict(checkpoint.shapes), dict(checkpoint.dtypes)
        self.arch, self.heads, self.order = arch, heads, canonical_order(arch, heads)
        prefixes = [arch.attention_prefix(layer_idx) for layer_idx in range(heads.num_hidden_layers)]
        self.reordered = {f"{prefix}.{name}.weight" for prefix in prefixes for name in (arch.query, arch.key)}
        self.parts: dict[str, tuple[str, int]] = {}
        self._split = "", list[torch.Tensor | None]()
        for packed in [f"{prefix}.{arch.packed}.{kind}" for prefix in prefixes for kind in ("weight", "bias")]:
            rows, *columns = self.shapes.get(packed, ()) or (0,)
            if rows and rows % 3 == 0:
                del self.shapes[packed]
                dtype, (prefix, kind) = self.dtypes.pop(packed), packed.split(f".{arch.packed}.")
                for side, name in enumerate((arch.query, arch.key, arch.value)):
                    part = f"{prefix}.{name}.{kind}"
                    self.parts[part] = packed, side
                    self.shapes[part], self.dtypes[part] = (rows // 3, *columns), dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, checked to be finite."""
        if name in self.parts:
            packed, side = self.parts[name]
            if self._split[0] != packed:  # its three parts are read one after another
                kind = packed.rsplit(".", 1)[1]
                whole = {f"{self.arch.packed}.{kind}": self.checkpoint.read(packed)}
                self._split = packed, split_projections(whole, kind, self.arch, self.heads)
            part = self._split[1][side]
            assert part is not None
            return part
        tensor = self.checkpoint.read(name)
        if self.order is None or name not in self.reordered:
            return tensor
        return tensor.unflatten(0, (-1, self.heads.head_dim))[:, self.order].flatten(0, 1)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes


def _decoupled_config(config: PreTrainedConfig, heads: HeadLayout) -> HeadfuseConfig:
    """The decoupled model that has every head of the source."""
    layers, each = heads.num_hidden_layers, list(range(heads.num_key_value_heads))
    readers = [[heads.source_head(query) for query in range(heads.num_attention_heads)]] * layers
    return HeadfuseConfig(
        source_config=config.to_dict(),
        num_key_heads=[len(each)] * layers,
        num_value_heads=[len(each)] * layers,
        key_head_of_query=readers,
        value_head_of_query=readers,
    )


class StreamedModel:
    """A causal language model whose decoder layers are loaded one after another, computed in float32.

    Args:
        checkpoint: the weights, as `weights.ModelWeights` shows them.
        config: the model's transformers config.
        device: where layers are computed.
    """

    def __init__(self, checkpoint: Checkpoint, config: PreTrainedConfig, device: torch.device) -> None:
        keep_freed_blocks()
        AttentionInterface.register(_CAPTURE, _capturing_attention)
        AttentionMaskInterface.register(_CAPTURE, sdpa_mask)
        self.config, self.device = config, device
        self.arch, self.heads = architecture_of(config.model_type), head_layout(config)
        self.checkpoint: Checkpoint | CanonicalCheckpoint = checkpoint
        if self.arch.legacy:
            self.checkpoint = CanonicalCheckpoint(checkpoint, self.arch, self.heads)
            self.arch, config = self.arch.decoupled(), _decoupled_config(config, self.heads)
        self.order = canonical_order(self.arch, self.heads)
        self.num_layers = config.num_hidden_layers
        self.model = model_without_weights(config, checkpoint.folder, "eager" if self.arch.legacy else _CAPTURE)
        self.model.config._attn_implementation = _CAPTURE
        self.layers: list[nn.Module] = [
            self.model.get_submodule(self.arch.layer_prefix(i)) for i in range(self.num_layers)
        ]
        self._load_outer()

    def _load_outer(self) -> None:
        """Materialise everything outside the layers: embeddings, final norm, head, rotary tables."""
        layer_names = tuple(self.arch.layer_prefix(i) + "." for i in range(self.num_layers))
        outer = {
            name: self.checkpoint.read(name).to(self.device, torch.float32)
            for name in self.model.state_dict()
            if not name.startswith(layer_names) and name in self.checkpoint
        }
        self.model.load_state_dict(outer, strict=False, assign=True)
        self.model.tie_weights()
        outside = (m for name, m in self.model.named_modules() if not f"{name}.".startswith(layer_names))
        compute_buffers(self.model, outside, self.device)

    def embed(self, windows: torch.Tensor, weight: float = 1.0) -> HiddenStates:
        """Token windows `[n, T]` -> input of layer 0, with the masks and positions of this length."""
        hidden: list[torch.Tensor] = []
        positional: list[tuple[Any, ...]] = [() for _ in self.layers]
        recorded: list[dict[str, Any]] = [{} for _ in self.layers]

        def recorder(index: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                positional[index], recorded[index] = args, kwargs
                if index == 0:
                    hidden.append(hidden_states)
                return hidden_states

            return forward

        with _forwards(self.layers, recorder, self.arch.legacy), torch.no_grad():
            for window in windows:
                self.model.base_model(input_ids=window[None].to(self.device), use_cache=False)
        width = self.model.config.hidden_size
        none = torch.empty(0, windows.shape[1], width, device=self.device)
        return HiddenStates(torch.cat([none, *hidden]), positional, recorded, weight)

    def layer_tensors(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """The stored tensors of one layer, in their own dtype, names relative to the layer."""
        release_freed_blocks()  # of the layer before
        prefix = self.arch.layer_prefix(layer_idx) + "."
        return {
            name.removeprefix(prefix): self.checkpoint.read(name)
            for name in self.checkpoint.shapes
            if name.startswith(prefix)
        }

    @contextlib.contextmanager
    def layer(
        self, layer_idx: int, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[Callable[[HiddenStates, list[AttentionCapture] | None], HiddenStates]]:
        """One layer with the given weights, as a function of hidden states that appends a capture per batch."""
        layer = self.layers[layer_idx]
        load_layer(layer, tensors, self.arch, self.device)
        compute_buffers(self.model, layer.modules(), self.device)
        attention: Any = layer.get_submodule(self.arch.attention)
        attention.headfuse_order, hooks = self.order, []
        if self.arch.norms:
            norm = attention.get_submodule(self.arch.norms[1])
            hooks.append(norm.register_forward_pre_hook(lambda _, args: setattr(attention, "headfuse_key", args[0])))

        def run(states: HiddenStates, captures: list[AttentionCapture] | None = None) -> HiddenStates:
            if not len(states):
                return states
            outputs, earlier = [], len(captures or ())
            attention.headfuse_captures = None if captures is None else (captures, states.weight)
            with torch.no_grad():
                for batch in states.hidden.split(max(1, BATCH_TOKENS // states.hidden.shape[1])):
                    result = layer(batch, *states.args[layer_idx], **states.kwargs[layer_idx])
                    outputs.append(result[0] if isinstance(result, tuple) else result)
            hidden = torch.cat(outputs)
            seen = [x for capture in (captures or ())[earlier:] for x in (capture.query, capture.key, capture.value)]
            if not all(map(is_finite, [hidden, *seen])):  # attention may hide what its scores are not
                raise CheckpointError(
                    f"layer {layer_idx} computes NaN or infinity",
                    where=self.checkpoint.folder,
                    fix="weights or config.json are damaged: take a checkpoint that generates text",
                )
            return replace(states, hidden=hidden)

        try:
            yield run
        finally:
            attention.headfuse_captures = attention.headfuse_key = None
            for hook in hooks:
                hook.remove()
            layer.to("meta")

    @torch.no_grad()
    def nll(self, states: HiddenStates, windows: torch.Tensor) -> tuple[float, ...]:
        """NLL per token of each of `windows [n, T]` given what the last layer made of them."""
        losses = []
        for state, window in zip(states.hidden, windows.to(self.device), strict=True):
            logits = self._after_layers(self.model, state, window[None]).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(logits.float(), window[1:]).item())
        return tuple(losses)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model's head, with its scale, makes of last hidden states `[..., D]`."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden * logit_scale(self.model.config))
        return logits

    def last_hidden_state(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output embeddings read `[n, T, D]`, given what the last layer made of the windows `[n, T, D]`."""
        tokens = torch.zeros(hidden.shape[1], dtype=torch.long, device=self.device)[None]  # of no effect
        outputs = [self._after_layers(self.model.base_model, h, tokens).last_hidden_state for h in hidden]
        return torch.cat(outputs)

    def end_gradient(
        self, states: HiddenStates, loss: Callable[[torch.Tensor, slice], torch.Tensor], chunk_tokens: int = 128
    ) -> torch.Tensor:
        """Gradient `[1, T, D]` with respect to the last layer's output, of a loss that is a sum over tokens.

        `loss` gets logits `[chunk, vocabulary]` and the place of their tokens in the window: never all logits at once.
        """
        end = states.hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            final = self.last_hidden_state(end)[0]
            hidden = final.detach().requires_grad_(True)
            for start in range(0, len(hidden), chunk_tokens):
                part = slice(start, start + chunk_tokens)
                loss(self.logits(hidden[part]), part).backward()
            final.backward(hidden.grad)
        assert end.grad is not None
        return end.grad

    def _after_layers(self, model: nn.Module, state: torch.Tensor, tokens: torch.Tensor) -> Any:
        """The output of a model whose last layer gives `state [T, D]`."""
        last = self.num_layers - 1

        def injector(index: int) -> Callable[..., torch.Tensor]:
            return lambda hidden_states, *args, **kwargs: state[None] if index == last else hidden_states

        with _forwards(self.layers, injector, self.arch.legacy):
            return model(input_ids=tokens, use_cache=False)


def load_layer(layer: nn.Module, tensors: Mapping[str, torch.Tensor], arch: Architecture, device: torch.device) -> None:
    """Give a layer on the meta device its stored tensors (names relative to it), in float32."""
    held = module_tensors(tensors, arch)
    layer.load_state_dict({name: tensor.to(device, torch.float32) for name, tensor in held.items()}, assign=True)


def keep_freed_blocks() -> None:
    """Let the C library use freed blocks again, where it is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, REUSED)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def release_freed_blocks() -> None:
    """Give them back to the system: by the gaps between blocks that stay, the heap would grow with every layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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


class _forwards:
    """Replace the layers' forward functions while a block runs."""

    def __init__(
        self, layers: list[nn.Module], make: Callable[[int], Callable[..., torch.Tensor]], tuples: bool
    ) -> None:
        self.layers, self.make, self.tuples = layers, make, tuples

    def __enter__(self) -> None:
        def in_tuple(forward: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor]]:
            return lambda *args, **kwargs: (forward(*args, **kwargs),)

        for index, layer in enumerate(self.layers):
            layer.forward = in_tuple(self.make(index)) if self.tuples and _gives_tuple(layer) else self.make(index)

    def __exit__(self, *exc: object) -> None:
        for layer in self.layers:
            del layer.forward


def _gives_tuple(layer: nn.Module) -> bool:
    """Whether a legacy family's layer gives a tuple in the installed transformers; gptj's does so up to 5.23."""
    return inspect.signature(type(layer).forward).return_annotation is not torch.Tensor


def _capturing_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    wanted = getattr(module, "headfuse_captures", None)
    if wanted is not None:
        captures, weight = wanted
        if kwargs.get("s_aux") is not None:
            raise UnsupportedModelError("attention sinks are not supported", fix="choose a model without them")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        before_norm = getattr(module, "headfuse_key", None)
        if before_norm is not None:
            before_norm = before_norm.view(*before_norm.shape[:2], -1, query.shape[-1])
        order: Any = module.headfuse_order
        if order is not None:
            query, key = query[..., order], key[..., order]
        capture = AttentionCapture(query, key, value, output, attention_mask, scale, weight, before_norm)
        captures.append(capture)
    return output, None
