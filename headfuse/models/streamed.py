"""Runs a checkpoint one decoder layer at a time, so that a model larger than memory can be measured and converted."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from headfuse.checkpoint.reader import Checkpoint
from headfuse.choices import Placement
from headfuse.models.attention import AttentionWeights, canonical_order
from headfuse.models.canonical import CanonicalCheckpoint, decoupled_config
from headfuse.models.capture import CAPTURE, AttentionCapture, ReconstructedKeys, capturing_attention
from headfuse.models.decoder_layers import DecoderLayers, HiddenStates, compute_buffers
from headfuse.models.families import architecture_of
from headfuse.models.heads import head_layout
from headfuse.models.heap import keep_freed_blocks, release_freed_blocks
from headfuse.models.loading import model_without_weights
from headfuse.models.placement import DeviceMemory, batch_tokens
from headfuse.models.precision import products_like
from headfuse.models.source_layer import LoadedLayer, SourceLayer
from headfuse.models.states import capped, logit_scale, softcap

logger = logging.getLogger(__name__)


class StreamedModel:
    """A causal language model whose decoder layers are loaded one after another, computed in float32.

    Args:
        checkpoint: the weights, as `weights.ModelWeights` shows them.
        config: the model's transformers config.
        device: where layers are computed.
        placement: what stays there between two uses.
        compute_dtype: what layers multiply in; all that is measured is in float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PreTrainedConfig,
        device: torch.device,
        placement: Placement = "auto",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        keep_freed_blocks()
        AttentionInterface.register(CAPTURE, capturing_attention)
        AttentionMaskInterface.register(CAPTURE, sdpa_mask)
        self.config, self.device = config, device
        self.arch, self.heads = architecture_of(config.model_type), head_layout(config)
        self.checkpoint: Checkpoint | CanonicalCheckpoint = checkpoint
        if self.arch.legacy:
            self.checkpoint = CanonicalCheckpoint(checkpoint, self.arch, self.heads)
            self.arch, config = self.arch.decoupled(), decoupled_config(config, self.heads)
        self.order = canonical_order(self.arch, self.heads)
        self.num_layers = config.num_hidden_layers
        self.model = model_without_weights(config, checkpoint.folder, "eager" if self.arch.legacy else CAPTURE)
        self.model.config._attn_implementation = CAPTURE
        tokens = batch_tokens(device, config.hidden_size)
        self.layers = DecoderLayers(self.model, self.arch, self.checkpoint, device, tokens, compute_dtype)
        shown = self.checkpoint
        batch = tokens * config.hidden_size
        memory = DeviceMemory.of(shown.shapes, shown.dtypes, self.arch, self.num_layers, batch)
        self.placement = memory.choose(placement, device)
        self.layers.kept = {} if self.placement == "resident" else None
        if device.type != "cpu":
            logger.info("on %s: %s, %.1f GB", device, self.placement, memory.needed(self.placement) / 1e9)
        self._load_outer()

    def _load_outer(self) -> None:
        """Materialise everything outside the layers: embeddings, final norm, head, rotary tables."""
        layer_names = tuple(self.arch.layer_prefix(i) + "." for i in range(self.num_layers))
        outer = {
            name: self.layers.copies(self.checkpoint.read(name)).to(torch.float32)
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
        positional: list[tuple[Any, ...]] = [() for _ in self.layers.modules]
        recorded: list[dict[str, Any]] = [{} for _ in self.layers.modules]

        def recorder(index: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                positional[index], recorded[index] = args, kwargs
                if index == 0:
                    hidden.append(hidden_states)
                return hidden_states

            return forward

        with _forwards(self.layers.modules, recorder, self.arch.legacy), torch.no_grad():
            for batch in self._batches(windows.to(self.device)):
                self.model.base_model(input_ids=batch, use_cache=False)
        width = self.model.config.hidden_size
        none = torch.empty(0, windows.shape[1], width, device=self.device)
        return HiddenStates(torch.cat([none, *hidden]), positional, recorded, weight)

    def _together(self, length: int) -> int:
        """Number of windows that go at once through the modules outside the layers."""
        return 1 if self.device.type == "cpu" else max(1, self.layers.batch_tokens // length)

    def _batches(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Windows `[n, T]` to embed at once, the last one alone: masks and positions are those of one window."""
        if len(windows) > 1:
            yield from windows[:-1].split(self._together(windows.shape[1]))
        if len(windows):
            yield windows[-1:]

    def walk(self, statistics: Sequence[HiddenStates], others: Sequence[HiddenStates] = ()) -> Iterator[SourceLayer]:
        """Every layer in turn, with its outputs for hidden states; attention is captured for those of `statistics`.

        Args:
            statistics: inputs of layer 0 whose attention is captured in every layer, one kind of window each.
            others: inputs that only run through.
        """
        states = (*statistics, *others)
        for layer_idx in range(self.num_layers):
            layer = self._walked(layer_idx, states, len(statistics))
            states = layer.outputs
            yield layer
            layer.release()

    def _walked(self, layer_idx: int, states: tuple[HiddenStates, ...], captured: int) -> SourceLayer:
        """One layer of a walk, the first `captured` of the states captured."""
        tensors, captures, outputs = self.layer_tensors(layer_idx), list[AttentionCapture](), list[HiddenStates]()
        with self.layer(layer_idx, tensors) as run:
            for index, each in enumerate(states):
                output, seen = run.capture(each) if index < captured else (run(each), ())
                outputs.append(output)
                captures += seen
        weights = self.attention_weights(tensors)
        return SourceLayer(layer_idx, tensors, weights, tuple(captures), states, tuple(outputs))

    def attention_weights(self, tensors: Mapping[str, torch.Tensor]) -> AttentionWeights:
        """The attention among a layer's tensors, where it can be widened to float64."""
        own = {name: self.layers.copies.exact(x) for name, x in tensors.items() if self.arch.owns(name)}
        return AttentionWeights.of_layer(own, self.arch, self.heads)

    def layer_tensors(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """The stored tensors of one layer, in their own dtype, names relative to the layer."""
        release_freed_blocks()  # of the layer before
        return self.layers.stored(layer_idx)

    @contextlib.contextmanager
    def layer(
        self,
        layer_idx: int,
        tensors: Mapping[str, torch.Tensor],
        keys: ReconstructedKeys | None = None,
    ) -> Iterator[LoadedLayer]:
        """One layer on the device with the given tensors (names relative to it), while the block runs.

        `keys`: what reconstructs the keys that its attention reads.
        """
        with self.layers.loaded(layer_idx, tensors) as module:
            attention: Any = module.get_submodule(self.arch.attention)
            attention.headfuse_order, attention.headfuse_keys = self.order, keys
            hook = self._watch_keys(attention)
            try:
                yield LoadedLayer(self.layers, layer_idx, module, self.checkpoint.folder)
            finally:
                attention.headfuse_key = attention.headfuse_keys = None
                hook.remove()

    def _watch_keys(self, attention: Any) -> Any:
        """Let an attention record the input of its key norm, `[B, T, n d]`, as `headfuse_key`."""

        def keep(keys: torch.Tensor) -> None:
            attention.headfuse_key = keys

        if self.arch.norm_after_rotary:
            norm = attention.get_submodule(self.arch.norms[1])
            return norm.register_forward_pre_hook(lambda _, args: keep(args[0].transpose(1, 2).flatten(2)))
        normed = bool(self.arch.norms) and hasattr(attention, self.arch.norms[1])
        projection = attention.get_submodule(self.arch.key) if normed else nn.Identity()
        return projection.register_forward_hook(lambda _, args, keys: keep(keys))

    @torch.no_grad()
    def nll(self, states: HiddenStates, windows: torch.Tensor) -> tuple[float, ...]:
        """NLL per token of each of `windows [n, T]`, given the last layer's output."""
        losses = []
        for state, window in zip(states.hidden, windows.to(self.device), strict=True):
            logits = self._after_layers(self.model, state[None], window[None]).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(logits.float(), window[1:]))
        return tuple(torch.stack(losses).tolist()) if losses else ()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the model's head, with its scale and cap, for last hidden states `[..., D]`."""
        logits = self.model.get_output_embeddings()(hidden * logit_scale(self.model.config))
        return capped(logits, softcap(self.model.config))

    def last_hidden_state(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output embeddings read `[n, T, D]`, given what the last layer made of the windows `[n, T, D]`."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)  # of no effect
        together = self._together(hidden.shape[1])
        parts = zip(hidden.split(together), tokens.split(together), strict=True)
        return torch.cat([self._after_layers(self.model.base_model, *part).last_hidden_state for part in parts])

    def end_gradient(
        self, states: HiddenStates, loss: Callable[[torch.Tensor, slice], torch.Tensor], chunk_tokens: int = 128
    ) -> torch.Tensor:
        """Gradient `[1, T, D]` with respect to the last layer's output, of a loss that is a sum over tokens.

        `loss` gets logits `[chunk, vocabulary]` and the place of their tokens in the window: never all logits at once.
        The head multiplies as the layers do (`products_like`).
        """
        end = states.hidden.detach().requires_grad_(True)
        with torch.enable_grad(), products_like(self.layers.compute_dtype):
            final = self.last_hidden_state(end)[0]
            hidden = final.detach().requires_grad_(True)
            for start in range(0, len(hidden), chunk_tokens):
                part = slice(start, start + chunk_tokens)
                loss(self.logits(hidden[part]), part).backward()
            final.backward(hidden.grad)
        assert end.grad is not None
        return end.grad

    def _after_layers(self, model: nn.Module, state: torch.Tensor, tokens: torch.Tensor) -> Any:
        """The output of a model whose last layer gives `state [n, T, D]`, on as many windows of tokens."""
        last = self.num_layers - 1

        def injector(index: int) -> Callable[..., torch.Tensor]:
            return lambda hidden_states, *args, **kwargs: state if index == last else hidden_states

        with _forwards(self.layers.modules, injector, self.arch.legacy):
            return model(input_ids=tokens, use_cache=False)


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
