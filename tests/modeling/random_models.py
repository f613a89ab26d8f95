"""Random decoupled models of several families, and the stock models that they stand for."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from headfuse.modeling import HeadfuseConfig

close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
QUERIES, HEAD_DIM, LAYERS = 6, 8, 3
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": QUERIES,
    "num_key_value_heads": QUERIES,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough that a wrong head shows in the logits
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SOURCES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "llama-bias": lambda: LlamaConfig(**SIZES, attention_bias=True, attention_dropout=0.5),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES),
}
# One entry per layer: (key head of each query head, value head of each query head).
MAPS: dict[str, list[tuple[list[int], list[int]]]] = {
    "full": [(list(range(QUERIES)), list(range(QUERIES)))] * LAYERS,
    "gqa": [([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2])] * LAYERS,
    "nested": [([0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]), ([0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2])] * 2,
    "free": [
        ([1, 0, 1, 2, 0, 1], [0, 1, 1, 1, 0, 1]),  # unequal groups, 3 key and 2 value heads
        ([0, 1, 0, 1, 0, 1], [3, 2, 1, 0, 3, 2]),  # 2 and 4, so neighbouring heads share a row of the cache
        ([5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0]),  # 6 and 1
    ],
}
IMPLEMENTATIONS = ("eager", "sdpa")
COMPILER = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")


def fused_config(source: Any, maps: str, slots: list[Any] | None = None, **kwargs: Any) -> HeadfuseConfig:
    """A decoupled config with the maps of that name."""
    layers = MAPS[maps][:LAYERS]
    return HeadfuseConfig(
        source_config=source.to_dict(),
        num_key_heads=[max(key) + 1 for key, _ in layers],
        num_value_heads=[max(value) + 1 for _, value in layers],
        key_head_of_query=[key for key, _ in layers],
        value_head_of_query=[value for _, value in layers],
        rotary_slots=slots,
        **kwargs,
    )


def random_model(config: Any, **kwargs: Any) -> Any:
    """A model with random weights, norms and biases included."""
    torch.manual_seed(0)
    auto = AutoModelForCausalLM.from_config(config, **kwargs)
    with torch.no_grad():
        for parameter in auto.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return auto.eval()


def expanded(fused: Any) -> Any:
    """The stock multi-head model that computes the same: key and value rows repeated as the maps say."""
    config = copy.deepcopy(fused.config.source_config)
    weights = fused.state_dict()
    for layer_idx in range(LAYERS):
        for name, heads in (
            ("k_proj", fused.config.key_head_of_query[layer_idx]),
            ("v_proj", fused.config.value_head_of_query[layer_idx]),
        ):
            for tensor in ("weight", "bias"):
                key = f"model.layers.{layer_idx}.self_attn.{name}.{tensor}"
                if key in weights:
                    weights[key] = weights[key].unflatten(0, (-1, HEAD_DIM))[heads].flatten(0, 1)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation=fused.config._attn_implementation)
    stock.load_state_dict(weights)
    return stock.eval()


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def rotary_table(num_heads: int, seed: int) -> list[list[int]]:
    """Slots with repeated and missing frequencies."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, HEAD_DIM // 2, (num_heads, HEAD_DIM // 2), generator=generator).tolist()
