"""Configuration of a model whose layers have their own numbers of key heads and of value heads.

This file is shipped beside the weights, so it imports only transformers and the standard library.
"""

import sys
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .configuration_family import FAMILIES, Family, rotary_dim

FORMAT = 1
CODE_VERSION = 7  # of the files beside the weights: a release that changes them raises it


AUTO_MAP = {
    "AutoConfig": "configuration_headfuse.HeadfuseConfig",
    "AutoModel": "modeling_headfuse.HeadfuseModel",
    "AutoModelForCausalLM": "modeling_headfuse.HeadfuseForCausalLM",
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NOT_INHERITED = ("quantization_config", "transformers_weights", "gradient_checkpointing")
"""Attributes of a source config that speak of its files or its run, not of its architecture."""
READ_BY_STOCK_CLASSES = ("_remove_final_layer_norm",)
"""Private attributes of a source config that its models read."""


class FusedConfig(PreTrainedConfig):
    """The config of a fused model, which holds that of its source: what is not set here is read from there.

    Attributes of this config hide the source's.
    """

    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    layout = ""
    headfuse_format: int = FORMAT
    source_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the source's config."""
        kwargs.pop("per_layer_config", None)  # as a process of vLLM saved it
        super().__post_init__(**kwargs)
        if self.headfuse_format != FORMAT:
            raise ValueError(
                f"headfuse_format: {self.headfuse_format} is not supported, only {FORMAT}; use a matching headfuse"
            )
        self.source_config = _source_config(self.source_config)
        for name in TOKEN_IDS:  # generation reads these from the dict of this config
            self.__dict__.setdefault(name, getattr(self.source_config, name, None))

    def __getattr__(self, name: str) -> Any:
        source = self.__dict__.get("source_config")
        hidden = name in NOT_INHERITED or (name.startswith("_") and name not in READ_BY_STOCK_CLASSES)
        if hidden or not isinstance(source, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(source, name)

    @property
    def one_head_widths(self) -> list[int]:
        """Channels of each layer's one head in vLLM's cache, which holds two of them: of keys and of values."""
        raise NotImplementedError

    def _give_layers_one_head(self) -> None:
        """Tell vLLM, which lays its cache out by the config of each layer, that a layer has one wide KV head.

        Elsewhere nothing reads it, and transformers would warn of a head dimension that differs by layer.
        """
        if "vllm" not in sys.modules:
            return
        self.num_key_value_heads = 1
        if getattr(self, "logits_scaling", None):  # granite's, which vLLM knows under the name and sense of cohere's
            multiplies = self.source_config.model_type == "hyperclovax"
            self.logit_scale = self.logits_scaling if multiplies else 1 / self.logits_scaling
        self.allow_global_per_layer_attribute_access = True  # RoPE reads the channels of a source head
        self.per_layer_config = {layer: {"head_dim": width} for layer, width in enumerate(self.one_head_widths)}

    @property
    def family(self) -> Family:
        """The table entry of the source's family."""
        return FAMILIES[self.source_config.model_type]

    @property
    def source_head_dim(self) -> int:
        """Channels of a source head."""
        source = self.source_config
        return int(getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads)

    def _per_layer(self, name: str) -> list[Any]:
        value, num_layers = getattr(self, name), self.source_config.num_hidden_layers
        if not isinstance(value, list | tuple) or len(value) != num_layers:
            raise ValueError(f"{name}: must be a list of {num_layers} entries, one per layer")
        return list(value)


class HeadfuseConfig(FusedConfig):
    """The source model's config, and which heads each layer has instead of the source's.

    Attributes that are not set here are read from `source_config`; setting one hides the source's.

    Args:
        headfuse_format: version of these fields.
        source_config: config of the source model, with its `model_type`.
        num_key_heads: key heads of each layer.
        num_value_heads: value heads of each layer.
        key_head_of_query: for each layer, the key head that each query head reads.
        value_head_of_query: for each layer, the value head that each query head reads.
        rotary_slots: None, or for each layer None (the stock order) or a table [key heads, p]: the rotary frequency
            that each slot of a key head carries, where p planes are rotated. Slot s is the pair of channels (s, s + p).

    Raises:
        ValueError: naming the field and the layer that do not fit.
    """

    model_type = "headfuse"
    layout = "decoupled"
    num_key_heads: Any = None
    num_value_heads: Any = None
    key_head_of_query: Any = None
    value_head_of_query: Any = None
    rotary_slots: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the heads of every layer."""
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        for side in ("key", "value"):
            self._check_heads(f"num_{side}_heads", f"{side}_head_of_query")
        self._check_slots()
        self.num_key_value_heads = max(*self.num_key_heads, *self.num_value_heads)
        self._give_layers_one_head()

    @property
    def one_head_widths(self) -> list[int]:
        """Channels of each layer's one head in vLLM's cache: of all its keys, or all its values, side by side."""
        counts = zip(self.num_key_heads, self.num_value_heads, strict=True)
        return [one_head_width(keys * self.source_head_dim, values * self.source_head_dim) for keys, values in counts]

    def _check_heads(self, counts_name: str, maps_name: str) -> None:
        num_queries = self.source_config.num_attention_heads
        counts, maps = self._per_layer(counts_name), self._per_layer(maps_name)
        for layer_idx, (count, heads) in enumerate(zip(counts, maps, strict=True)):
            if not _is_table(heads, num_queries):
                raise ValueError(f"{maps_name}[{layer_idx}]: must be {num_queries} head indices, one per query head")
            used = sorted(set(heads))
            if used != list(range(len(used))) or count != len(used):
                raise ValueError(
                    f"{maps_name}[{layer_idx}]: reads heads {used}, but {counts_name}[{layer_idx}] is {count}; "
                    f"every head from 0 must be read"
                )

    def _check_slots(self) -> None:
        if self.rotary_slots is None:
            return
        planes = rotary_dim(self.source_config) // 2
        for layer_idx, table in enumerate(self._per_layer("rotary_slots")):
            if table is None:
                continue
            num_heads = self.num_key_heads[layer_idx]
            if not isinstance(table, list | tuple) or len(table) != num_heads:
                raise ValueError(f"rotary_slots[{layer_idx}]: must be null or {num_heads} lists, one per key head")
            for head, frequencies in enumerate(table):
                if not _is_table(frequencies, planes) or not all(0 <= f < planes for f in frequencies):
                    raise ValueError(f"rotary_slots[{layer_idx}][{head}]: must be {planes} integers in [0, {planes})")


def one_head_width(key_channels: int, value_channels: int) -> int:
    """Channels of the one head that holds so many of keys, or so many of values, in vLLM's cache.

    Its kernels for GPUs take multiples of 8 from 32 on (vLLM 0.32, `supports_head_size` in v1/attention/backends).
    """
    return max(32, -(-max(key_channels, value_channels) // 8) * 8)


def _is_table(value: object, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length and all(type(item) is int for item in value)


def _source_config(source: object) -> PreTrainedConfig:
    if isinstance(source, PreTrainedConfig):
        fields, model_type = None, source.model_type
    elif isinstance(source, dict):
        fields, model_type = dict(source), source.get("model_type")
    else:
        raise ValueError("source_config: is missing; it must be the config of the source model")
    if model_type not in FAMILIES:
        raise ValueError(f"source_config: model_type {model_type!r} is not one of {', '.join(sorted(FAMILIES))}")
    return source if fields is None else CONFIG_MAPPING[model_type](**fields)
