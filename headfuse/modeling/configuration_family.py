"""Where the stock classes of the model families keep what fused models replace.

This file is shipped beside the weights, so it imports only the standard library.
"""

from dataclasses import dataclass
from typing import Any, Literal


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
