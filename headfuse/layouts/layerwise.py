"""`layerwise`: one head count per layer for keys and values, as the DeciLM `block_configs` of vLLM and TensorRT-LLM."""

from __future__ import annotations

from typing import Any

from headfuse.errors import UnsupportedModelError
from headfuse.models.heads import head_dim
from headfuse.plan import FusionPlan

FAMILIES = {"llama": None, "mistral": False, "qwen2": True}
"""Families that equal Llama except for query, key and value biases; None: `attention_bias` decides."""
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
)  # fmt: skip
FFN_MULTIPLE = 256
"""DeciLM's runtimes round the width that `ffn_mult` asks for up to a multiple of this."""


def config(source: dict[str, Any], plan: FusionPlan) -> dict[str, Any]:
    """A complete DeciLM config.json: no value is left to defaults, which differ between families."""
    return layerwise_config(source, plan.head_budget.key_heads)


def layerwise_config(source: dict[str, Any], num_key_value_heads: tuple[int, ...]) -> dict[str, Any]:
    """The config.json of a model with these KV heads in its layers, given that of its source."""
    from headfuse.modeling.configuration_layerwise import AUTO_MAP, FORMAT
    from headfuse.models.config import config_of, dtype_of

    whole = config_of(source)
    biases = getattr(whole, "attention_bias", False)
    qkv_bias = FAMILIES[source["model_type"]]
    ffn = _ffn(whole.intermediate_size, whole.hidden_size)
    groups = [whole.num_attention_heads // count for count in num_key_value_heads]
    rope = whole.rope_parameters
    return {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": dict(AUTO_MAP),
        "dtype": dtype_of(source),
        "headfuse_format": FORMAT,
        "source_model_type": source["model_type"],
        **{name: head_dim(whole) if name == "head_dim" else getattr(whole, name) for name in KEPT},
        "rope_theta": rope["rope_theta"],  # mlx-lm reads these two, transformers `rope_parameters`
        "rope_scaling": None if rope["rope_type"] == "default" else dict(rope),
        "num_key_value_heads": max(num_key_value_heads),
        "attention_bias": biases,
        "qkv_bias": biases if qkv_bias is None else qkv_bias,
        "mlp_bias": getattr(whole, "mlp_bias", False),
        "block_configs": [
            {"attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": group}, "ffn": dict(ffn)}
            for group in groups
        ],
    }


def family_config(layerwise: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the source's family for a layerwise one, with the largest number of KV heads."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = layerwise["source_model_type"]
    biases = {"attention_bias": layerwise["qkv_bias"], "mlp_bias": layerwise["mlp_bias"]}
    return {
        "model_type": model_type,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        "dtype": layerwise["dtype"],
        **{name: layerwise[name] for name in (*KEPT, "num_key_value_heads")},
        **(biases if FAMILIES[model_type] is None else {}),
        **({"sliding_window": None} if model_type == "mistral" else {}),
    }


def _ffn(intermediate_size: int, hidden_size: int) -> dict[str, Any]:
    """The feed-forward part of a block.

    vLLM reads `ffn_mult` if present. TensorRT-LLM and mlx-lm read only that key, and mlx-lm refuses other keys.
    """
    ffn: dict[str, Any] = {"no_op": False, "replace_with_linear": False}
    if intermediate_size % FFN_MULTIPLE:
        return {**ffn, "intermediate_size": intermediate_size}
    return {**ffn, "ffn_mult": 1.5 * intermediate_size / hidden_size}


def check(config: Any) -> None:
    """Refuse what the runtimes' DeciLM class does not compute.

    Raises:
        UnsupportedModelError: naming the layouts that work.
    """
    reason = None
    if config.model_type not in FAMILIES:
        reason = f"it exists for models like Llama ({', '.join(FAMILIES)}), not for model_type {config.model_type!r}"
    else:
        window = getattr(config, "sliding_window", None)
        if window is not None and window < config.max_position_embeddings:
            reason = f"its runtimes attend to all tokens, but this model attends to the last {window} only"
    if reason is not None:
        raise UnsupportedModelError(
            f"layout layerwise does not fit: {reason}", where="--layout", fix="use layout gqa or decoupled"
        )
