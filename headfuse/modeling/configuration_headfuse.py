"""Configuration of a model whose layers have their own numbers of key heads and of value heads.

This file is shipped beside the weights, so it imports only transformers and the standard library.
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal

from transformers import CONFIG_MAPPING, PreTrainedConfig

FORMAT = 1
CODE_VERSION = 5  # of the files beside the weights: a release that changes them raises it


@dataclass(frozen=True)
class Family:
    """Where the stock classes of a model family keep what is replaced, and how they rotate keys.

    A decoupled model stores `q_proj`, `k_proj` and `v_proj` whatever its family has, with the channels of a query or
    key head in one order: the first channels of all rotary planes, the second ones, then those that are not rotated.
    Scaling, dropout, clamps (`clip_qkv`) and the window of an attention are read from its stock module and config.
    """

    layers: str = "layers"
    """The list of decoder layers, relative to the base model."""
    attention: str = "self_attn"
    """The attention module, relative to a layer."""
    packed: str | None = None
    """The stock projection of queries, keys and values together, where there is one."""
    output: str = "o_proj"
    """The output projection, relative to the attention module; stays as it is."""
    rotary: Literal["half", "interleaved", "once", "swapped", "none"] = "half"
    """How the model's cos and sin [b, s, 2 p] hold the p frequencies: as two halves, each one twice in a row, or there
    are none; `once`: cos and sin [b, s, p]; `swapped`: sin and cos [b, s, p]. Where a layer gets none, they are its
    own table `embed_positions`, at `position_ids`."""
    norm: Literal["head", "layer"] | None = None
    """Norms of queries and keys: over the channels of each head, or over those of all heads at once."""
    norm_names: tuple[str, str] = ("q_norm", "k_norm")
    norm_after_rotary: bool = False
    """The norms stand behind RoPE."""
    norm_option: str | None = None
    """The option of the source's config that has to be set for the norms to be there."""
    rotates_in_windows: bool = False
    """Layers that attend to all tokens are not rotated, where others have windows (exaone4, cohere2)."""
    softcap: bool = False
    """The stock attention caps its scores at `attn_logit_softcapping`."""
    not_in_vllm: str | None = None
    """What keeps vLLM's backend for transformers' models from running the family, if anything does."""


FAILS = "vLLM 0.32 fails with the source in that backend as well, "
FAMILIES: dict[str, Family] = {
    "apertus": Family(norm="head"),
    "arcee": Family(),
    "bloom": Family("h", "self_attention", "query_key_value", "dense", "none", not_in_vllm="it leaves out ALiBi"),
    "cohere": Family(rotary="interleaved", norm="head", norm_option="use_qk_norm"),
    "cohere2": Family(rotary="interleaved", rotates_in_windows=True),
    "cwm": Family(),
    "dots1": Family(norm="head"),
    "ernie4_5": Family(),
    "ernie4_5_moe": Family(),
    "exaone4": Family(norm="head", rotates_in_windows=True),
    "flex_olmo": Family(norm="layer"),
    "gemma": Family(),
    "gemma2": Family(softcap=True),
    "gemma3_text": Family(norm="head"),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": Family(norm="head", norm_option="use_qk_norm"),
    "gpt2": Family("h", "attn", "c_attn", "c_proj", "none"),
    "gpt_neox": Family("layers", "attention", "query_key_value", "dense"),
    "gpt_oss": Family(rotary="once", not_in_vllm="its attention has sinks"),
    "gptj": Family(
        "h", "attn", None, "out_proj", "swapped", not_in_vllm="transformers' GPT-J takes no other attention"
    ),
    "granite": Family(),
    "granitemoe": Family(),
    "granitemoeshared": Family(),
    "helium": Family(),
    "hunyuan_v1_dense": Family(norm="head", norm_names=("query_layernorm", "key_layernorm"), norm_after_rotary=True),
    "hunyuan_v1_moe": Family(
        norm="head",
        norm_names=("query_layernorm", "key_layernorm"),
        norm_after_rotary=True,
    ),
    "hyperclovax": Family(),
    "jais2": Family(),
    "llama": Family(),
    "mellum": Family(norm="head", not_in_vllm=FAILS + "as it adds mtp_num_hidden_layers, which is None, to a number"),
    "minimax_m2": Family(norm="layer", not_in_vllm=FAILS + "on a CPU, where its router of experts takes softmax only"),
    "ministral": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(norm="layer"),
    "olmo3": Family(norm="layer"),
    "olmoe": Family(norm="layer"),
    "opt": Family("decoder.layers", output="out_proj", rotary="none"),
    "phi": Family(output="dense", norm="head", norm_names=("q_layernorm", "k_layernorm"), norm_option="qk_layernorm"),
    "phi3": Family(packed="qkv_proj"),
    "phimoe": Family(not_in_vllm=FAILS + "which takes its router of experts for a linear layer"),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(norm="head"),
    "qwen3_moe": Family(norm="head"),
    "seed_oss": Family(),
    "smollm3": Family(),
    "solar_open": Family(),
    "stablelm": Family(norm="head", norm_names=("q_layernorm", "k_layernorm"), norm_option="qk_layernorm"),
    "starcoder2": Family(),
    "vaultgemma": Family(softcap=True),
}
"""Model families whose attention can be decoupled."""
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


def rotary_dim(config: Any) -> int:
    """Channels of a key head that RoPE rotates in a source model; the first ones."""
    if FAMILIES[config.model_type].rotary == "none":
        return 0
    if getattr(config, "rotary_dim", None):
        return int(config.rotary_dim)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * ((getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor") or 1.0))


def has_norm(config: Any) -> bool:
    """Whether a source model of a family in the table has norms of queries and keys."""
    family = FAMILIES[config.model_type]
    return family.norm is not None and (family.norm_option is None or bool(getattr(config, family.norm_option, False)))


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
