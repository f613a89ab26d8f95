"""Tiny random models with their tokenizer and text, and the command as the tests call it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import headfuse
from headfuse.cli import app

WORDS = ["the", "head", "of", "a", "key", "reads", "what", "value", "it", "was", "given", "and", "no", "more"]
VOCABULARY = 300
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 16}}
"""What makes a family differ from llama at the size of these models."""


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
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
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


def plant(folder: Path, key_groups: Groups, value_groups: Groups | None = None, d: int = 8) -> None:
    """Make the heads of each group equal up to a phase and scale per plane (keys) or an invertible map (values)."""
    torch.manual_seed(3)

    def rotation() -> torch.Tensor:
        plane = torch.polar(torch.rand(d // 2) + 0.5, torch.rand(d // 2) * 6)
        c, s = torch.diag(plane.real), torch.diag(plane.imag)
        return torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)])

    def matrix() -> torch.Tensor:
        return torch.eye(d) + 0.3 * torch.randn(d, d)

    def change(attention: Any) -> None:
        for projection, groups, draw in (
            (attention.k_proj, key_groups, rotation),
            (attention.v_proj, key_groups if value_groups is None else value_groups, matrix),
        ):
            for first, *others in groups:
                for other in others:
                    change_of_basis = draw()
                    for heads in by_head(projection):
                        heads[other] = change_of_basis @ heads[first]

    edit_heads(folder, change)
