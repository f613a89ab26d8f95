"""The conversion through its real entry point, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import headfuse
from headfuse.cli import app
from headfuse.fusion import FUSION_METHODS

WORDS = ["the", "head", "of", "a", "key", "reads", "what", "value", "it", "was", "given", "and", "no", "more"]


def tiny_model(folder: Path, model_type: str = "llama", kv_heads: int = 4) -> Path:
    torch.manual_seed(0)
    kinds = {
        "llama": headfuse_config("LlamaConfig"),
        "mistral": headfuse_config("MistralConfig"),
        "qwen2": headfuse_config("Qwen2Config"),
    }
    config = kinds[model_type](
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "bias" in name else 0.2)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [" ".join(WORDS)], trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(WORDS), (2000,), generator=generator).tolist()
    (folder.parent / "text.txt").write_text(" ".join(WORDS[i] for i in picks))
    return folder


def headfuse_config(name: str):  # type: ignore[no-untyped-def]
    import transformers

    return getattr(transformers, name)


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


def fuse(model: Path, out: Path, *args: object) -> dict[str, object]:
    text = model.parent / "text.txt"
    line = run("fuse", model, "-o", out, "--data", text, "--samples", 8, "--sequence-length", 32, "--json", *args)
    document: dict[str, object] = json.loads(line.splitlines()[-1])
    return document


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        result: torch.Tensor = headfuse.load(folder)(tokens).logits
    return result


@pytest.mark.parametrize("layout", ["gqa", "decoupled"])
@pytest.mark.parametrize("method", sorted(FUSION_METHODS))
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_full_budget_copies_bit_for_bit(tmp_path: Path, model_type: str, method: str, layout: str) -> None:
    model = tiny_model(tmp_path / "model", model_type)
    fuse(model, tmp_path / "out", "--budget", 1, "--method", method, "--layout", layout)
    assert torch.equal(logits(model), logits(tmp_path / "out"))


def plant(model: Path, groups: list[list[int]]) -> None:
    """Make the heads of each group equal up to a phase and scale per plane (keys) or an invertible map (values)."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    d = 8
    for layer in loaded.model.layers:
        attention = layer.self_attn
        for group in groups:
            for j in group[1:]:
                first, own = slice(group[0] * d, group[0] * d + d), slice(j * d, j * d + d)
                phase = torch.polar(torch.rand(d // 2) + 0.5, torch.rand(d // 2) * 6)
                c, s = torch.diag(phase.real), torch.diag(phase.imag)
                key_map = torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)])
                value_map = torch.eye(d) + 0.3 * torch.randn(d, d)
                for projection, map_ in ((attention.k_proj, key_map), (attention.v_proj, value_map)):
                    projection.weight.data[own] = map_ @ projection.weight.data[first]
                    if projection.bias is not None:
                        projection.bias.data[own] = map_ @ projection.bias.data[first]
    loaded.save_pretrained(model)


@pytest.mark.parametrize("layout", ["gqa", "decoupled"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_planted_groups_are_found_and_lossless(tmp_path: Path, model_type: str, layout: str) -> None:
    model = tiny_model(tmp_path / "model", model_type)
    plant(model, [[0, 3], [1, 2]])
    document = fuse(model, tmp_path / "out", "--budget", "1/2", "--layout", layout, "--allocator", "uniform")
    assert document["kv_ratio"] == 0.5
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-4, atol=1e-4)


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    for name in ("a", "b"):
        fuse(model, tmp_path / name, "--budget", "1/4")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(("budget", "code"), [("0", 2), ("-1", 2), ("1.5", 2), ("nan", 2), ("abc", 2), ("0.1", 1)])
def test_bad_budgets(tmp_path: Path, budget: str, code: int) -> None:
    model = tiny_model(tmp_path / "model")
    output = run("fuse", model, f"--budget={budget}", "-o", tmp_path / "out", code=code)
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in run("fuse", tmp_path / "nothing", code=1)


def test_truncated_weights(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "complete" in run("fuse", model, "-o", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["headfuse-25", "headfuse-50", "gqa-25"])
def test_packaged_configs_are_those_of_the_repository(name: str) -> None:
    from headfuse.config import load_config

    root = Path(__file__).parent.parent
    assert load_config(str(root / f"configs/{name}.yaml"), {}) == load_config(name, {})
