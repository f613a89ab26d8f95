"""Tiny random models with their tokenizer and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

WORDS = ["the", "head", "of", "a", "key", "reads", "what", "value", "it", "was", "given", "and", "no", "more"]
VOCABULARY = 300
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_GRANITE = {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.5}
_CAPPED = {
    "sliding_window": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8,
}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention"]
PER_LAYER = ("layer_types", "no_rope_layers")
"""Options with an entry per layer: those of the first layers, repeated."""
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 16, "layer_types": _MIXED},
    "cwm": {"sliding_window": 16, "bos_token_id": 0},
    "dots1": _ROUTED,
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone4": {"sliding_window": 16, "layer_types": _MIXED},
    "flex_olmo": _EXPERTS,
    "gemma2": _CAPPED,
    "gemma3_text": {"sliding_window": 16, "layer_types": _MIXED, "query_pre_attn_scalar": 8},
    "glm": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "glm4_moe": _ROUTED,
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {**_EXPERTS, "sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gptj": {"rotary_dim": 4},
    "granite": _GRANITE,
    "granitemoe": {**_EXPERTS, **_GRANITE},
    "granitemoeshared": {**_EXPERTS, **_GRANITE, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {**_EXPERTS, "moe_topk": 2},
    "hyperclovax": _GRANITE,
    "mellum": {**_EXPERTS, "moe_intermediate_size": 16, "sliding_window": 16, "layer_types": _MIXED},
    "minimax_m2": _EXPERTS,
    "ministral": {"sliding_window": 16, "layer_types": _MIXED},
    "mistral": {"sliding_window": 16},
    "mixtral": {**_EXPERTS, "sliding_window": 16},
    "olmo": {"clip_qkv": 30.0},
    "olmo3": {"sliding_window": 16, "layer_types": _MIXED},
    "olmoe": {**_EXPERTS, "clip_qkv": None},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "phi3": {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "phimoe": {**_EXPERTS, "sliding_window": 16},
    "qwen2_moe": {**_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 16},
    "smollm3": {"no_rope_layers": [1, 0], "sliding_window": None},
    "solar_open": _ROUTED,
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"sliding_window": 16},
    "vaultgemma": _CAPPED,
}
"""What makes a family differ from llama at the size of these models."""
NARROW = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""Families whose query heads together may be wider than the hidden size."""


def tiny_config(
    model_type: str, kv_heads: int = 4, layers: int = 2, query_heads: int = 4, head_dim: int = 8
) -> PreTrainedConfig:
    """The config of a tiny model of a family."""
    width = 32 if model_type in NARROW else head_dim * query_heads
    options = dict(FAMILY_OPTIONS.get(model_type, {}))
    options.update({name: (options[name] * layers)[:layers] for name in PER_LAYER if name in options})
    config: PreTrainedConfig = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=query_heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=128,
        **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, **options},
    )  # fmt: skip
    return config


def tiny_model(
    folder: Path,
    model_type: str = "llama",
    kv_heads: int = 4,
    layers: int = 2,
    dtype: str = "float32",
    query_heads: int = 4,
    head_dim: int = 8,
) -> Path:
    """A random model of a family, its tokenizer, and `text.txt` beside the folder."""
    torch.manual_seed(0)
    config = tiny_config(model_type, kv_heads, layers, query_heads, head_dim)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "bias" in name else 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    picks = torch.randint(len(WORDS), (2000,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder.parent / "text.txt").write_text(" ".join(WORDS[i] for i in picks))
    return folder
