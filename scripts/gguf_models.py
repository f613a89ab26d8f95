"""GGUF files of three families as Hugging Face folders: weights dequantised, config and tokenizer from the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Gemma3TextConfig, GenerationConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from headfuse.checkpoint.weight_files import SINGLE
from headfuse.errors import UnsupportedModelError

LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""Names of a layer's modules: of GGUF, of Hugging Face."""
GEMMA = {
    **LAYER, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma3": Gemma3TextConfig}
EMBEDDINGS = "model.embed_tokens.weight"


def write_folder(file: Path, folder: Path, dtype: torch.dtype, eos: list[int] | None = None) -> None:
    """Write the model of a GGUF file, whose embeddings are tied, into an empty folder.

    Args:
        file: the GGUF file.
        folder: where config, weights, tokenizer and generation config go.
        dtype: of the written weights.
        eos: tokens that end a text, where the file's one is not all of them.

    Raises:
        UnsupportedModelError: for another architecture than those of CONFIGS.
    """
    reader = gguf.GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture not in CONFIGS:
        raise UnsupportedModelError(f"architecture {architecture!r}", where=file, fix=f"known: {', '.join(CONFIGS)}")
    tensors = read_tensors(reader, architecture, dtype)
    config = read_config(reader, architecture, tensors[EMBEDDINGS].shape[0])
    config.dtype = dtype
    # The tokenizer of the GGUF file brings the chat template, which is saved as chat_template.jinja.
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    config.save_pretrained(folder)
    ends = eos or config.eos_token_id
    pad = _field(reader, "tokenizer.ggml.padding_token_id")
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=ends, pad_token_id=pad).save_pretrained(folder)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    # safetensors creates its file for the owner alone
    (folder / SINGLE).chmod((folder / "config.json").stat().st_mode)


def read_tensors(reader: gguf.GGUFReader, architecture: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights under Hugging Face's names, as its classes hold them.

    Where the file holds the tied matrix twice, at two precisions, the output's, which is the finer one, is taken.
    """
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in stored:
        del stored["token_embd.weight"]
    heads = {
        f"attn_{side}": int(_field(reader, f"{architecture}.attention.head_count{kv}") or 0)
        for side, kv in (("q", ""), ("k", "_kv"))
    }
    tensors = {}
    for name, tensor in stored.items():
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if architecture == "gemma3" and "norm" in name:
            weight = weight - 1  # GGUF stores 1 + w
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            weight = _halves(weight, heads[part])
        tensors[_name(name, GEMMA if architecture == "gemma3" else LAYER)] = weight.to(dtype).contiguous()
    return tensors


def read_config(reader: gguf.GGUFReader, architecture: str, vocabulary: int) -> PreTrainedConfig:
    """The config that the file's fields describe."""

    def value(key: str) -> Any:
        return _field(reader, f"{architecture}.{key}")

    heads = value("attention.head_count")
    theta = _decimal(value("rope.freq_base"))
    shared = {
        "vocab_size": vocabulary, "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"), "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": _decimal(value("attention.layer_norm_rms_epsilon")), "tie_word_embeddings": True,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }  # fmt: skip
    if architecture == "gemma3":
        return _gemma(shared, value("attention.key_length"), value("attention.sliding_window"), theta)
    shared["head_dim"] = shared["hidden_size"] // heads
    shared["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    name = "LlamaForCausalLM" if architecture == "llama" else "Qwen2ForCausalLM"
    return CONFIGS[architecture](architectures=[name], **shared)


def _gemma(shared: Mapping[str, Any], head_dim: int, window: int, theta: float) -> PreTrainedConfig:
    """Every sixth layer of Gemma 3 sees everything; the others have a window, and frequencies of their own."""
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=window,
        layer_types=[
            "sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(shared["num_hidden_layers"])
        ],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **shared,
    )


def _name(name: str, layer: Mapping[str, str]) -> str:
    outer = {"token_embd.weight": EMBEDDINGS, "output.weight": EMBEDDINGS, "output_norm.weight": "model.norm.weight"}
    if name in outer:
        return outer[name]
    _, number, part, kind = name.split(".")
    return f"model.layers.{number}.{layer[part]}.{kind}"


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head's rotary pairs, which GGUF's llama has side by side, as Hugging Face has them: in two halves."""
    head_dim = weight.shape[0] // heads
    return weight.view(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def _decimal(value: float) -> float:
    """A number of the published config, which GGUF rounds to float32."""
    return float(f"{value:.6g}")
