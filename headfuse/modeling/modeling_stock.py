"""What fused models take over from the stock classes of transformers: an attention module, and the model around it.

This file is shipped beside the weights, so it imports only torch, transformers and the standard library.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_MAPPING, Cache, PreTrainedModel

from .configuration_family import Family, has_norm
from .configuration_headfuse import FusedConfig
from .modeling_one_head import check_runtime


class StockAttention(nn.Module):
    """A stock attention module with other projections of queries, keys and values.

    An instance is a stock module whose class was made a subclass of this one: its norms, scaling, dropout and output
    projection stay as they are.
    """

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    clip: float | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    k_norm: nn.Module
    family: Family
    residual_dropout: float
    norm: str | None
    softcap: float | None
    sinks: torch.Tensor | None
    rotates: bool
    embed_positions: torch.Tensor
    sliding_window: int | None

    def decouple(self, config: Any) -> None:
        """Give a stock module, whose class has just become this one, the heads of its layer."""
        raise NotImplementedError

    def reset_tables(self) -> None:
        """Write the index buffers, which loading on the meta device leaves undefined."""
        raise NotImplementedError

    def adopt(self, config: Any) -> None:
        """Take what does not depend on the heads from the config and from the stock module."""
        self.config = config  # bloom's attention keeps none
        self.family = config.family
        self.head_dim = config.source_head_dim
        self.scaling = getattr(self, "scaling", self.head_dim**-0.5)
        rate = _dropout(self, "attention_dropout", "attn_dropout", "dropout")
        self._modules.pop("attention_dropout", None)  # bloom's is a module, and a number may not take its name
        self.attention_dropout = rate
        self.residual_dropout = _dropout(self, "residual_dropout", "resid_dropout", "hidden_dropout")
        self.clip = getattr(config, "clip_qkv", None)
        self.norm = self.family.norm if has_norm(config.source_config) else None
        self.softcap = getattr(self, "attn_logit_softcapping", None) if self.family.softcap else None
        self.sinks = getattr(self, "sinks", None)
        self.rotates = _rotates(self)
        if not hasattr(self, "sliding_window"):
            self.sliding_window = getattr(config, "sliding_window", None)
        if not getattr(self, "is_sliding", True):  # exaone4 keeps the width of other layers' windows
            self.sliding_window = None

    def replace_projections(self, key_width: int, value_width: int, whole_keys: bool = False) -> None:
        """Projections of the source's queries, and of so many channels of keys and of values; or of all its keys."""
        family, config = self.family, self.config
        if whole_keys:
            heads = getattr(config.source_config, "num_key_value_heads", None) or config.num_attention_heads
            key_width = heads * self.head_dim
            self._fit_norm(heads)  # vLLM makes the stock module for one head
        stock = getattr(self, family.packed or "q_proj")
        has_bias = stock.bias is not None
        widths = {"q_proj": config.num_attention_heads * self.head_dim, "k_proj": key_width, "v_proj": value_width}
        for name, width in widths.items():
            setattr(self, name, nn.Linear(config.hidden_size, width, bias=has_bias).to(stock.weight))
        if family.packed:
            delattr(self, family.packed)

    def _fit_norm(self, num_keys: int) -> None:
        """Give the norm of keys as many weights as the layer has key heads, where each head has its own."""
        norm: Any = getattr(self, self.family.norm_names[1], None)
        if self.family.norm == "layer":
            self.k_norm = type(norm)(num_keys * self.head_dim, norm.variance_epsilon)
        elif hasattr(norm, "norms"):  # stablelm: a module for each head
            norm.norms = norm.norms[:num_keys]
        elif norm is not None and norm.weight.dim() == 2:  # cohere: a row for each head
            norm.weight = nn.Parameter(norm.weight[:num_keys].detach().clone())

    def _heads(self, hidden_states: torch.Tensor, projection: nn.Linear, side: int) -> torch.Tensor:
        """Queries (side 0) or keys (side 1) [b, s, heads, d] before the rotation, behind a norm that stands there."""
        states = projection(hidden_states)
        if self.norm == "layer":
            states = self._normed(states, side)
        if self.clip is not None:
            states = states.clamp(-self.clip, self.clip)
        states = states.unflatten(-1, (-1, self.head_dim))
        if self.norm == "head" and not self.family.norm_after_rotary:
            states = self._normed(states, side)
        return states

    def _normed(self, states: torch.Tensor, side: int) -> torch.Tensor:
        """Queries (side 0) or keys (side 1) behind their norm."""
        norm: Any = getattr(self, self.family.norm_names[side])
        if hasattr(norm, "norms"):  # which takes [b, heads, s, d]
            return norm(states.transpose(1, 2)).transpose(1, 2)
        return norm(states)


def check_no_cache(arguments: dict[str, Any]) -> None:
    """Refuse a KV cache among arguments that are ignored: every step would attend to its own tokens alone.

    Raises:
        TypeError: naming the argument.
    """
    for name, value in arguments.items():
        named = "cache" in name or "past" in name  # cache_position and use_cache are no caches
        if isinstance(value, Cache) or (named and (hasattr(value, "update") or isinstance(value, list | tuple))):
            raise TypeError(
                f"layout decoupled: the KV cache comes as the argument {name!r}, which this model code does not know; "
                "use transformers 5.16.1 to 5.24, or refresh the code with `headfuse export FOLDER --refresh`"
            )


def with_bias(bias: torch.Tensor, mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """Biases of query heads [b, n_q, 1, s] and a mask (bool, additive or None: causal) as one mask [b, n_q, t, s]."""
    if mask is None:
        positions = torch.arange(bias.shape[-1], device=bias.device)
        mask = (positions <= positions[-length:, None])[None, None]
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _rotates(attention: Any) -> bool:
    """Whether RoPE turns the queries and keys of a layer, which may depend on its window."""
    family, window = attention.family, getattr(attention, "sliding_window", None)
    if family.rotary == "none" or not getattr(attention, "use_rope", True):
        return False
    if not family.rotates_in_windows:
        return True
    return bool(window is None or attention.is_sliding) if hasattr(attention, "is_sliding") else window is not None


def _dropout(attention: nn.Module, *names: str) -> float:
    """The rate of the dropout that a stock attention has under one of these names, as a number or as a module."""
    rates = (getattr(attention, name, None) for name in names)
    rate = next((rate for rate in rates if rate is not None), 0.0)
    return float(getattr(rate, "p", rate))


@functools.cache
def specialise(cls: type, stock: type) -> type:
    """A class that is both `cls` and `stock`, with the name of `cls` in files and its own name in registries."""
    names = {"__module__": cls.__module__, "__qualname__": f"{cls.__name__}[{stock.__name__}]"}
    return type(cls.__name__, (cls, stock), {**names, "stock_class": stock, "__reduce_ex__": _reduce})


def _reduce(module: Any, protocol: Any) -> Any:
    """How pickle stores an instance of a specialised class, which no module holds under a name: by both its bases."""
    stored = object.__reduce_ex__(module, protocol)
    made = type(module)  # or a further subclass, which has to be importable itself
    return (_empty, made.__bases__, *stored[2:]) if "__reduce_ex__" in vars(made) else stored


def _empty(cls: type, stock: type) -> Any:
    """An instance of a specialised class without its state, which pickle fills in."""
    specialised: Any = specialise(cls, stock)
    return specialised.__new__(specialised)


class FusedPreTrainedModel(PreTrainedModel):
    """What the base model and the causal LM share: constructing one gives a subclass of the family's stock class."""

    attention_class: ClassVar[type]
    stock_class: ClassVar[type | None] = None
    stock_classes: ClassVar[Any] = MODEL_MAPPING

    def __new__(cls, config: FusedConfig | None = None, *args: Any, **kwargs: Any) -> FusedPreTrainedModel:
        """Pick the subclass of the source's family."""
        model_class: Any = cls
        if cls.stock_class is None:
            # not isinstance: as remote code, each of the two files may be loaded with a HeadfuseConfig of its own
            if config is None or config.model_type != cls.config_class.model_type:
                wanted = cls.config_class.__name__
                raise TypeError(f"{cls.__name__} needs a {wanted}, not {type(config).__name__}")
            model_class = specialise(model_class, cls.stock_classes[type(config.source_config)])
            if config.family.softcap:  # which sdpa leaves out
                model_class._supports_sdpa = False
        return super().__new__(model_class)

    def __init__(self, config: FusedConfig, *args: Any, **kwargs: Any) -> None:
        check_runtime(config)
        super().__init__(config, *args, **kwargs)
        for layer in self.base_model.get_submodule(config.family.layers):
            attention = getattr(layer, config.family.attention)
            attention.__class__ = specialise(self.attention_of(config, attention.layer_idx), attention.__class__)
            attention.decouple(config)
        self.post_init()

    def attention_of(self, config: Any, layer_idx: int) -> type:
        """The class of a layer's attention."""
        return self.attention_class

    def initialize_weights(self) -> None:
        """Initialise what was not loaded, index buffers included."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, StockAttention):
                module.reset_tables()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse `generate_batch`, which would log an error and return nothing.

        Raises:
            NotImplementedError: always; its cache has one shape for all layers.
        """
        raise NotImplementedError(f"layout {self.config.layout}: generate_batch has one cache shape; use generate")

    def _get_static_cache_init_shape(self) -> None:
        """No common shape: static caches take each layer's from its first states."""
