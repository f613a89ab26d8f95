"""Tiny random models with their tokenizer and text, and the command as the tests call it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import headfuse
from headfuse.cli.app import app
from headfuse.models.attention import AttentionWeights
from headfuse.models.families import ARCHITECTURES, Architecture
from headfuse.models.heads import head_layout
from headfuse.plan import HeadLayout

WORDS = ["the", "head", "of", "a", "key", "reads", "what", "value", "it", "was", "given", "and", "no", "more"]
VOCABULARY = 300
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {"rotary_dim": 4},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "mistral": {"sliding_window": 16},
    "mixtral": {**_EXPERTS, "sliding_window": 16},
    "olmo": {"clip_qkv": 30.0},
    "olmoe": {**_EXPERTS, "clip_qkv": None},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "phi3": {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": _EXPERTS,
    "stablelm": {"use_qkv_bias": True},
}
"""What makes a family differ from llama at the size of these models."""
NARROW = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""Families whose query heads together may be wider than the hidden size."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


def tiny_model(
    folder: Path,
    model_type: str = "llama",
    kv_heads: int = 4,
    layers: int = 2,
    dtype: str = "float32",
    query_heads: int = 4,
) -> Path:
    """A random model of a family, its tokenizer, and `text.txt` beside the folder."""
    torch.manual_seed(0)
    width = 32 if model_type in NARROW else 8 * query_heads
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=query_heads, num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=0, pad_token_id=None, **FAMILY_OPTIONS.get(model_type, {}),
    )  # fmt: skip
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


def run(*args: object, code: int = 0) -> str:
    """The output of the command, checked for its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


def fuse(model: Path, out: Path, *args: object) -> dict[str, Any]:
    """`headfuse fuse` on the tiny text; the document of `--json`."""
    text = model.parent / "text.txt"
    line = run("fuse", model, "-o", out, "--data", text, "--samples", 8, "--sequence-length", 32, "--json", *args)
    document: dict[str, Any] = json.loads(line.splitlines()[-1])
    return document


def logits(folder: Path) -> torch.Tensor:
    """Logits `[2, 20, vocabulary]` on fixed random tokens."""
    tokens = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        result: torch.Tensor = headfuse.load(folder)(tokens).logits
    return result


def edit_heads(folder: Path, change: Any) -> None:
    """Load a model, call `change(attention module)` on every layer, and save it again."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            change(layer.self_attn)
    model.save_pretrained(folder)


def by_head(projection: torch.nn.Linear, d: int = 8) -> list[torch.Tensor]:
    """Views of a projection's weight `[n, d, D]` and, where there is one, its bias `[n, d, 1]`."""
    views = [projection.weight.data.view(-1, d, projection.weight.shape[1])]
    return views if projection.bias is None else [*views, projection.bias.data.view(-1, d, 1)]


Groups = Sequence[Sequence[int]]


def edit_weights(folder: Path, change: Callable[[AttentionWeights, Architecture, HeadLayout], None]) -> None:
    """Call `change(weights, architecture, heads)` on every layer of a checkpoint of any family, and save it again."""
    config, file = AutoConfig.from_pretrained(folder), folder / "model.safetensors"
    arch, heads, tensors = ARCHITECTURES[config.model_type], head_layout(config), load_file(file)
    for layer_idx in range(heads.num_hidden_layers):
        prefix = arch.layer_prefix(layer_idx) + "."
        layer = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        weights = AttentionWeights.of_layer(layer, arch, heads)
        change(weights, arch, heads)
        for name, tensor in weights.in_layer(layer, arch, heads).items():
            tensors[prefix + name] = tensor.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def plant(folder: Path, key_groups: Groups, value_groups: Groups | None = None) -> None:
    """Make the heads of each group equal up to what fuses without loss.

    Keys: a phase and scale per rotary plane, any invertible map of what is not rotated, nothing behind a norm; values:
    any invertible map.
    """
    torch.manual_seed(3)

    def matrix(size: int) -> torch.Tensor:
        return torch.eye(size) + 0.3 * torch.randn(size, size)

    def key_map(rotated: int, d: int) -> torch.Tensor:
        plane = torch.polar(torch.rand(rotated // 2) + 0.5, torch.rand(rotated // 2) * 6)
        c, s = torch.diag(plane.real), torch.diag(plane.imag)
        return torch.block_diag(torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)]), matrix(d - rotated))

    def change(weights: AttentionWeights, arch: Architecture, heads: HeadLayout) -> None:
        d, normed = heads.head_dim, weights.key_norm is not None
        for first, *others in key_groups:
            for other in others:
                change_of_basis = torch.eye(d) if normed else key_map(heads.rotary_dim, d)
                weights.key[other] = change_of_basis @ weights.key[first]
                if weights.key_bias is not None:
                    weights.key_bias[other] = change_of_basis @ weights.key_bias[first]
                if weights.key_norm is not None and len(weights.key_norm) > 1:
                    weights.key_norm[other] = weights.key_norm[first]
        for first, *others in key_groups if value_groups is None else value_groups:
            for other in others:
                change_of_basis = matrix(d)
                weights.value[other] = change_of_basis @ weights.value[first]
                if weights.value_bias is not None:
                    weights.value_bias[other] = change_of_basis @ weights.value_bias[first]

    edit_weights(folder, change)


def assert_decoding_equals_forward(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor, lengths: Sequence[int]
) -> None:
    """Decode left-padded `tokens [rows, width]`, four at once, then one by one: every row has its logits alone."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, steps = None, list[torch.Tensor]()
    with torch.no_grad():
        for start, end in itertools.pairwise([0, 4, *range(5, tokens.shape[1] + 1)]):
            step = model(
                tokens[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = step.past_key_values
            steps.append(step.logits)
        decoded = torch.cat(steps, dim=1)
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, -length:], use_cache=False).logits[0]
            torch.testing.assert_close(decoded[row, -length:], alone, rtol=1e-4, atol=1e-4)
