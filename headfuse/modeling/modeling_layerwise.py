"""Llama-like models whose layers have their own numbers of KV heads: the stock classes with other projections.

This file is shipped beside the weights, so it imports only torch and transformers.
"""

from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from .configuration_layerwise import LayerwiseConfig


class DeciLMAttention(LlamaAttention):
    """Stock attention with the KV heads of its layer, and biases that queries, keys and values may have alone."""

    def __init__(self, config: LayerwiseConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        num_kv_heads = config.num_key_value_heads_per_layer[layer_idx]
        self.num_key_value_groups = config.num_attention_heads // num_kv_heads
        for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", num_kv_heads), ("v_proj", num_kv_heads)):
            setattr(self, name, nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias))


class DeciLMModel(LlamaModel):
    """The decoder without a head on top."""

    config_class = LayerwiseConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        counts = config.num_key_value_heads_per_layer
        if config._attn_implementation == "vllm" and len(set(counts)) > 1:
            raise NotImplementedError(
                "layout layerwise: vLLM's backend for transformers' models has one number of KV heads, and would write "
                "wrong tokens; leave out --model-impl transformers, as vLLM has a DeciLMForCausalLM of its own"
            )
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = DeciLMAttention(config, layer_idx)
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    """The language model; named as vLLM and TensorRT-LLM know it."""

    config_class = LayerwiseConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As of transformers.

        Raises:
            NotImplementedError: where layers have other numbers of KV heads; it would log an error and return nothing.
        """
        if len(set(self.config.num_key_value_heads_per_layer)) > 1:
            raise NotImplementedError("layout layerwise: generate_batch has one cache shape; use generate")
        return super().init_continuous_batching(*args, **kwargs)
