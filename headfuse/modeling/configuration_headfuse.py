"""Configuration of a model whose layers have their own numbers of key heads and of value heads.

This file is shipped beside the weights, so it imports only transformers and the standard library.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

FORMAT = 1
FAMILIES = {"llama": "o_proj", "mistral": "o_proj", "qwen2": "o_proj", "qwen3": "o_proj"}
"""Model families whose attention can be decoupled, and the name of their output projection.

A family fits if its attention is `self_attn` of each of `layers`, has `q_proj`, `k_proj` and `v_proj`, rotates
half-style, goes through the attention interface, and has at most per-head norms `q_norm` and `k_norm`.
"""
AUTO_MAP = {
    "AutoConfig": "configuration_headfuse.HeadfuseConfig",
    "AutoModel": "modeling_headfuse.HeadfuseModel",
    "AutoModelForCausalLM": "modeling_headfuse.HeadfuseForCausalLM",
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NOT_INHERITED = ("quantization_config", "transformers_weights", "gradient_checkpointing")
"""Attributes of a source config that speak of its files or its run, not of its architecture."""


class HeadfuseConfig(PreTrainedConfig):
    """The source model's config, and which heads each layer has instead of the source's.

    Attributes that are not set here are read from `source_config`; setting one hides the source's.

    Args:
        headfuse_format: version of these fields.
        source_config: config of the source model, with its `model_type`.
        num_key_heads: key heads of each layer.
        num_value_heads: value heads of each layer.
        key_head_of_query: for each layer, the key head that each query head reads.
        value_head_of_query: for each layer, the value head that each query head reads.
        rotary_slots: None, or for each layer None (the stock order) or a table [key heads, head_dim / 2]: the rotary
            frequency that each slot of a key head carries. Slot s is the pair of channels (s, s + head_dim / 2).

    Raises:
        ValueError: naming the field and the layer that do not fit.
    """

    model_type = "headfuse"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    headfuse_format: int = FORMAT
    source_config: Any = None
    num_key_heads: Any = None
    num_value_heads: Any = None
    key_head_of_query: Any = None
    value_head_of_query: Any = None
    rotary_slots: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the source's config and check the heads of every layer."""
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        if self.headfuse_format != FORMAT:
            raise ValueError(
                f"headfuse_format: {self.headfuse_format} is not supported, only {FORMAT}; use a matching headfuse"
            )
        self.source_config = _source_config(self.source_config)
        for name in TOKEN_IDS:  # generation reads these from the dict of this config
            self.__dict__.setdefault(name, getattr(self.source_config, name, None))
        for side in ("key", "value"):
            self._check_heads(f"num_{side}_heads", f"{side}_head_of_query")
        self._check_slots()

    def __getattr__(self, name: str) -> Any:
        source = self.__dict__.get("source_config")
        if name.startswith("_") or name in NOT_INHERITED or not isinstance(source, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(source, name)

    @property
    def num_key_value_heads(self) -> int:
        """The largest number of key heads or value heads of any layer."""
        return max(*self.num_key_heads, *self.num_value_heads)

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
        head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        for layer_idx, table in enumerate(self._per_layer("rotary_slots")):
            if table is None:
                continue
            num_heads = self.num_key_heads[layer_idx]
            if not isinstance(table, list | tuple) or len(table) != num_heads:
                raise ValueError(f"rotary_slots[{layer_idx}]: must be null or {num_heads} lists, one per key head")
            for head, frequencies in enumerate(table):
                if not _is_table(frequencies, head_dim // 2) or not all(0 <= f < head_dim // 2 for f in frequencies):
                    raise ValueError(
                        f"rotary_slots[{layer_idx}][{head}]: must be {head_dim // 2} integers in [0, {head_dim // 2})"
                    )

    def _per_layer(self, name: str) -> list[Any]:
        value, num_layers = getattr(self, name), self.source_config.num_hidden_layers
        if not isinstance(value, list | tuple) or len(value) != num_layers:
            raise ValueError(f"{name}: must be a list of {num_layers} entries, one per layer")
        return list(value)


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
