"""Which weights a model has is what transformers makes of the same folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM, Glm4MoeForCausalLM

from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from tests.support.commands import fuse, run
from tests.support.model_edits import EMBEDDING, HEAD, edit_json, edit_tensors
from tests.support.model_outputs import TOKENS, in_transformers, logits
from tests.support.tiny_models import VOCABULARY, tiny_model


def other_head(model: Path) -> None:
    """The file holds a head of its own, though config.json ties it."""
    torch.manual_seed(5)
    edit_tensors(model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 0.3 * torch.randn(VOCABULARY, 32)}))


def head_alone(model: Path) -> None:
    """As accelerate writes tied embeddings: under the name of the head."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    save_model(loaded, str(model / "model.safetensors"), metadata={"format": "pt"})
    assert EMBEDDING not in load_file(model / "model.safetensors")


def same_head(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))


def streamed_logits(folder: Path) -> torch.Tensor:
    source = Source.open(str(folder))
    streamed = StreamedModel(source.checkpoint, source.config, torch.device("cpu"))
    states = streamed.embed(TOKENS)
    for layer_idx in range(streamed.num_layers):
        with streamed.layer(layer_idx, streamed.layer_tensors(layer_idx)) as layer, torch.no_grad():
            states = layer(states)
    with torch.no_grad():
        return streamed.logits(streamed.last_hidden_state(states.hidden))


TIES: dict[str, Callable[[Path], None]] = {"other": other_head, "alone": head_alone, "same": same_head}


@pytest.mark.parametrize("name", TIES)
def test_tied_weights_are_those_of_transformers(model: Path, tmp_path: Path, name: str) -> None:
    """In what is measured, in every layout, and after each further step."""
    TIES[name](model)
    expected = in_transformers(model)
    torch.testing.assert_close(streamed_logits(model), expected, rtol=1e-4, atol=1e-4)
    for layout in ("gqa", "layerwise", "decoupled"):
        out = tmp_path / layout
        fuse(model, out, "--budget", 1, "--layout", layout, "--preset", "fast")
        torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-4)
        raw = json.loads((out / "config.json").read_text())
        raw = raw.get("source_config", raw)
        assert raw["tie_word_embeddings"] == (name != "other")  # as runtimes need it that go by the config alone
        assert (HEAD in load_file(out / "model.safetensors")) == (name == "other")


def test_tied_weights_in_the_other_commands(model: Path, tmp_path: Path) -> None:
    """Exports and trained folders of a folder as it came, not from `fuse`."""
    for name, change in TIES.items():
        folder = Path(shutil.copytree(model, tmp_path / name))
        change(folder)
        expected = in_transformers(folder)
        run("export", folder, "--to", "layerwise", "-o", tmp_path / f"{name}-layerwise")
        torch.testing.assert_close(logits(tmp_path / f"{name}-layerwise"), expected, rtol=1e-4, atol=1e-4)
        out = tmp_path / f"{name}-trained"
        run(
            "uptrain", folder, "--loss", "ce", "--tokens", 64, "--data", tmp_path / "text.txt", "--sequence-length", 32,
            "--batch-size", 1, "--learning-rate", 1e-9, "-o", out,
        )  # fmt: skip
        torch.testing.assert_close(in_transformers(out), expected, rtol=1e-4, atol=1e-4)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == (name != "other")
        assert EMBEDDING in load_file(out / "model.safetensors")


def test_a_gguf_file_of_weights_under_the_heads_name(model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for name, change in TIES.items():
        folder = Path(shutil.copytree(model, tmp_path / name))
        change(folder)
        run("export", folder, "--to", "gguf", "--type", "f32", "-o", tmp_path / f"{name}.gguf")
        names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        assert "token_embd.weight" in names
        assert ("output.weight" in names) == (name == "other")


def test_a_head_that_is_neither_tied_nor_there_is_missing(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", tie_word_embeddings=False)
    message = run("fuse", model, "-o", tmp_path / "out", "--dry-run", code=1)
    assert "tensor lm_head.weight is missing" in message
    assert "tie_word_embeddings" in message
    edit_json(model / "config.json", tie_word_embeddings=True)
    edit_tensors(model, lambda tensors: tensors.pop(EMBEDDING))
    assert f"tensor {EMBEDDING} is missing" in run("fuse", model, "-o", tmp_path / "out", "--dry-run", code=1)


# ---------------------------------------------------------------- what transformers ignores


IGNORED = [
    "v_head.summary.weight",
    "model.mtp.0.proj.weight",
    "model.layers.0.self_attn.k_scale",
    "model.layers.1.self_attn.q_proj.bias",
    "score.weight",
]


def test_what_transformers_ignores_is_left_out(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = in_transformers(model)
    edit_tensors(model, lambda tensors: tensors.update({name: torch.ones(3, 2) for name in IGNORED}))
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    found = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)[1]
    assert found["unexpected_keys"] == set(IGNORED)
    assert not found["missing_keys"]
    data, text = ("--data", tmp_path / "text.txt", "--sequence-length", 32), tmp_path / "text.txt"
    commands: dict[str, tuple[object, ...]] = {
        "fuse": ("fuse", model, "-o", tmp_path / "out", "--budget", 1, *data, "--samples", 8),
        "dry run": ("fuse", model, "--dry-run", *data),
        "analyze": ("analyze", model, *data, "--samples", 4),
        "eval": ("eval", model, *data, "--samples", 2),
        "uptrain": ("uptrain", model, "--loss", "ce", "--tokens", 64, "--batch-size", 1, *data, "-o", tmp_path / "up"),
        "export": ("export", model, "--to", "layerwise", "-o", tmp_path / "export"),
    }
    assert text.exists()
    for name, command in commands.items():
        caplog.clear()
        run(*command)
        said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        assert len(said) == 1, name
        assert "5 tensors" in said[0]
        assert "inv_freq" not in said[0]
    for folder in ("out", "up", "export"):
        assert not set(IGNORED) & load_file(tmp_path / folder / "model.safetensors").keys()
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=1e-4, atol=1e-4)


def test_layers_that_predict_further_tokens_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As GLM-4.5 has one behind its last layer, whose number its class in transformers names (here a smaller one)."""
    monkeypatch.setattr(Glm4MoeForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    model = tiny_model(tmp_path / "model", "glm4_moe", query_heads=8)
    edit_json(model / "config.json", num_nextn_predict_layers=1)
    before = in_transformers(model)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
        tensors.update({name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in last.items()})
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(32, 64)

    edit_tensors(model, add)
    for layout in ("gqa", "decoupled"):
        caplog.clear()
        fuse(model, tmp_path / layout, "--budget", 1, "--layout", layout, "--preset", "fast")
        assert "left out, as transformers does" in caplog.text
        torch.testing.assert_close(logits(tmp_path / layout), before, rtol=1e-4, atol=1e-4)
        raw = json.loads((tmp_path / layout / "config.json").read_text())
        assert raw.get("source_config", raw)["num_nextn_predict_layers"] == 0
        assert not [name for name in load_file(tmp_path / layout / "model.safetensors") if "layers.2." in name]
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(32, 64)}))
    assert "model.layers.3.eh_proj.weight is not in the model" in run("fuse", model, "--dry-run", code=1)


def test_a_needed_tensor_under_another_name_is_missing(model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.0.attn.wk.weight": tensors.pop(name)}))
    assert f"tensor {name} is missing" in run("fuse", model, "-o", tmp_path / "out", "--dry-run", code=1)


# ---------------------------------------------------------------- quantised weights


def replaced(new: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors.update(new(name.removesuffix(".weight"), tensors.pop(name)))

    return lambda model: edit_tensors(model, change)


def packed(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    return {
        f"{base}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{base}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{base}.scales": torch.ones(1, rows),
    }


def gguf_alone(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model-q4_0.gguf").write_bytes(b"GGUF")


def gguf_without_config(model: Path) -> None:
    gguf_alone(model)
    (model / "config.json").unlink()


QUANTISED: dict[str, tuple[Callable[[Path], None], str]] = {
    "GPTQ": (replaced(lambda b, w: {**packed(b, w), f"{b}.g_idx": torch.zeros(8, dtype=torch.int32)}), "GPTQ"),
    "AWQ": (replaced(packed), "AWQ"),
    "4 bits": (
        replaced(lambda b, w: {f"{b}.weight": w.to(torch.uint8), f"{b}.weight.quant_state.bitsandbytes__nf4":
                               torch.zeros(8, dtype=torch.uint8), f"{b}.weight.absmax": torch.ones(8)}),
        "bitsandbytes",
    ),
    "8 bits": (replaced(lambda b, w: {f"{b}.weight": w.to(torch.int8), f"{b}.SCB": torch.ones(8)}), "bitsandbytes"),
    "fp8": (
        replaced(lambda b, w: {f"{b}.weight": w.to(torch.float8_e4m3fn), f"{b}.weight_scale_inv": torch.ones(1, 1)}),
        "fp8",
    ),
    "fp8 without scales": (replaced(lambda b, w: {f"{b}.weight": w.to(torch.float8_e4m3fn)}), "fp8"),
    "scales": (replaced(lambda b, w: {f"{b}.weight": w, f"{b}.weight_scale": torch.ones(1)}), "scales"),
    "MLX": (
        replaced(lambda b, w: {f"{b}.weight": torch.zeros(8, 4, dtype=torch.uint32), f"{b}.scales": torch.ones(8, 1),
                               f"{b}.biases": torch.ones(8, 1)}),
        "MLX",
    ),
    "GGUF": (gguf_alone, "GGUF"),
    "GGUF without a config": (gguf_without_config, "GGUF"),
    "a config of MLX": (lambda model: edit_json(model / "config.json", quantization={"bits": 4}), "quantised"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_named_in_every_command(model: Path, tmp_path: Path, name: str) -> None:
    damage, expected = QUANTISED[name]
    damage(model)
    data = ("--data", tmp_path / "text.txt", "--sequence-length", 32)
    for command in (
        ("fuse", model, *data),
        ("fuse", model, "--dry-run", *data),
        ("analyze", model, *data),
        ("eval", model, *data),
        ("uptrain", model, "--loss", "ce", "--tokens", 64, *data),
        ("export", model, "--to", "layerwise"),
    ):
        message = run(*command, code=1)
        assert expected in message, command
        assert "full-precision model" in message, command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


# ---------------------------------------------------------------- models with another head


@pytest.mark.parametrize(
    "name",
    ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForRewardModel", "InternRewardModel"],
)
def test_models_with_another_head_are_named(model: Path, tmp_path: Path, name: str) -> None:
    edit_json(model / "config.json", architectures=[name])
    data = ("--data", tmp_path / "text.txt", "--sequence-length", 32)
    for command in (
        ("fuse", model, "--dry-run", *data),
        ("eval", model, *data),
        ("export", model, "--to", "layerwise"),
    ):
        assert f"{name} is not a causal language model" in run(*command, code=1)


def test_a_base_model_is_what_transformers_makes_of_it(model: Path, tmp_path: Path) -> None:
    """Its tensors lack the first part of their names; tied, it is a language model, else it lacks a head."""
    edit_json(model / "config.json", architectures=["LlamaModel"])
    tensors = load_file(model / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, model / "model.safetensors")
    expected = in_transformers(model)
    fuse(model, tmp_path / "out", "--budget", 1, "--layout", "gqa")
    torch.testing.assert_close(in_transformers(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    edit_json(model / "config.json", tie_word_embeddings=False)
    assert "LlamaModel is a model without a head" in run("fuse", model, "--dry-run", code=1)
