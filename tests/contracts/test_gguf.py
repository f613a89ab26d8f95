"""GGUF files: what llama.cpp computes with them is what transformers computes with the folder."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import headfuse
from headfuse.layouts.gguf import writer as gguf
from tests.support.commands import fuse, run
from tests.support.llama_cpp import assert_same, export
from tests.support.tiny_models import tiny_model


def adapted(folder: Path, **changes: Any) -> Path:
    """The model with other values in config.json; every layer attends to all tokens."""
    config = json.loads((folder / "config.json").read_text())
    config.update({"sliding_window": None, "use_sliding_window": False, **changes})
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("family", sorted(gguf.FAMILIES))
def test_a_source_model_in_llama_cpp(tmp_path: Path, family: str) -> None:
    model = adapted(tiny_model(tmp_path / "model", family))
    document = export(model, tmp_path / "m.gguf", "--type", "f32")
    assert document["architecture"] == gguf.FAMILIES[family].name
    assert document["kv_bytes_per_token"] == {"before": 256, "after": 256}
    assert_same(model, tmp_path / "m.gguf")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_layers_with_counts_of_their_own_in_llama_cpp(tmp_path: Path, family: str) -> None:
    model = adapted(tiny_model(tmp_path / "model", family, query_heads=8, layers=3))
    (tmp_path / "options.yaml").write_text("budget: {key_heads: [2, 4, 1], value_heads: [2, 4, 1]}\npreset: fast\n")
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml", "--layout", "layerwise")
    document = export(tmp_path / "out", tmp_path / "m.gguf", "--type", "f32")
    assert document["architecture"] == "deci"
    assert document["num_key_value_heads"] == [2, 4, 1]
    assert_same(tmp_path / "out", tmp_path / "m.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_fused_stock_model_in_llama_cpp(tmp_path: Path, family: str) -> None:
    model = adapted(tiny_model(tmp_path / "model", family, query_heads=8))
    fuse(model, tmp_path / "out", "--layout", "gqa", "--budget", "0.5", "--preset", "fast")
    assert export(tmp_path / "out", tmp_path / "m.gguf", "--type", "f32")["num_key_value_heads"] == [2, 2]
    assert_same(tmp_path / "out", tmp_path / "m.gguf")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_heads_of_another_width_with_a_table_of_frequencies_in_llama_cpp(tmp_path: Path, family: str) -> None:
    model = adapted(tiny_model(tmp_path / "model", family, query_heads=8))
    fuse(model, tmp_path / "out", "--layout", "gqa", "--head-dim", "16", "--budget", "0.5", "--preset", "fast")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]["rope_type"] == "longrope"
    document = export(tmp_path / "out", tmp_path / "m.gguf", "--type", "f32")
    assert document["num_key_value_heads"] == [1, 1]
    assert document["kv_bytes_per_token"] == {"before": 128, "after": 128}
    assert_same(tmp_path / "out", tmp_path / "m.gguf", length=100)


def test_decoupled_heads_where_a_stock_layer_computes_the_same(tmp_path: Path) -> None:
    model = adapted(tiny_model(tmp_path / "model", query_heads=8))
    options = "budget: {key_heads: [1, 2], value_heads: [2, 2]}\nmethod: mean\ngrouping: neighbours\npreset: fast\n"
    (tmp_path / "options.yaml").write_text(options)
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml")
    document = export(tmp_path / "out", tmp_path / "m.gguf", "--type", "f32")
    assert (document["architecture"], document["num_key_value_heads"]) == ("llama", [2, 2])
    assert document["kv_bytes_per_token"] == {"before": 7 * 16, "after": 8 * 16}
    assert_same(tmp_path / "out", tmp_path / "m.gguf")


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {"rms_norm_eps": 1e-2},
    ],
    ids=["llama3", "linear", "epsilon"],
)
def test_what_the_config_says_reaches_llama_cpp(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = adapted(tiny_model(tmp_path / "model", query_heads=8), **changes)
    export(model, tmp_path / "m.gguf", "--type", "f32")
    assert_same(model, tmp_path / "m.gguf", length=100)


def test_scaled_rope_where_the_architecture_has_no_factors(tmp_path: Path) -> None:
    """The file was written, and llama.cpp could not load it."""
    model = adapted(tiny_model(tmp_path / "model", "qwen2"), rope_parameters=LLAMA3)
    assert export(model, tmp_path / "m.gguf", "--type", "f32")["architecture"] == "deci"
    assert_same(model, tmp_path / "m.gguf", length=100)
    model = adapted(tiny_model(tmp_path / "other" / "model", "qwen3"), rope_parameters=LLAMA3)
    said = " ".join(run("export", model, "--to", "gguf", "-o", tmp_path / "n.gguf", code=1).split())
    assert "llama.cpp has no architecture for model_type 'qwen3' with factors of rotary frequencies" in said
    assert "rope_type 'llama3'" in said
    assert not (tmp_path / "n.gguf").exists()


def test_tied_embeddings_are_there_once(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf").GGUFReader
    model = adapted(tiny_model(tmp_path / "model"), tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    export(model, tmp_path / "m.gguf", "--type", "f32")
    assert "output.weight" not in {tensor.name for tensor in reader(tmp_path / "m.gguf").tensors}
    assert_same(model, tmp_path / "m.gguf")


@pytest.mark.parametrize(("file_type", "tolerance", "most"), [("f16", 0.02, 0.51), ("q8_0", 0.3, 0.35)])
def test_smaller_numbers(tmp_path: Path, file_type: str, tolerance: float, most: float) -> None:
    reader = pytest.importorskip("gguf").GGUFReader
    model = adapted(tiny_model(tmp_path / "model", query_heads=8))
    options = [] if file_type == "f16" else ["--type", file_type]
    export(model, tmp_path / "m.gguf", *options)
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader(tmp_path / "m.gguf").tensors}
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == file_type.upper()
    # rows of 48 numbers are no multiple of the blocks of q8_0
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    sizes = [4 * int(tensor.n_elements) for tensor in tensors.values()]
    assert sum(int(tensor.n_bytes) for tensor in tensors.values()) < most * sum(sizes)
    assert_same(model, tmp_path / "m.gguf", tolerance)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tokenizers") / "model")


# ---------------------------------------------------------------- outputs and refusals


def test_the_file_appears_whole_or_not_at_all(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.gguf"

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device", str(out))

    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFWriter.write_tensor_data", full_disk)
        assert "free some space" in run("export", model, "--to", "gguf", "-o", out, code=1)
    assert not list(tmp_path.iterdir())
    run("export", model, "--to", "gguf", "-o", out, "-q")
    before = out.read_bytes()
    assert "already exists" in run("export", model, "--to", "gguf", "-o", out, code=1)
    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFWriter.write_tensor_data", full_disk)
        run("export", model, "--to", "gguf", "-o", out, "--overwrite", code=1)
    assert out.read_bytes() == before
    run("export", model, "--to", "gguf", "-o", out, "--overwrite", "--type", "f32", "-q")
    assert len(out.read_bytes()) > len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    (tmp_path / "folder").mkdir()
    assert "is a folder" in run("export", model, "--to", "gguf", "-o", tmp_path / "folder", "--overwrite", code=1)


def test_two_exports_to_one_file(model: Path, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "m.gguf.headfuse.partial").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in run("export", model, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    assert (tmp_path / "m.gguf.headfuse.partial").exists()


def test_without_the_package(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *args: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    message = run("export", model, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    assert 'pip install "headfuse[gguf]"' in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_llama_cpp_does_not_compute(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = adapted(tiny_model(tmp_path / "model"), **changes)
    assert message in run("export", folder, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    assert not (tmp_path / "m.gguf").exists()


def test_layers_of_families_that_deci_is_not(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen3", query_heads=8)
    options = "budget: {key_heads: [1, 2], value_heads: [1, 2]}\nmethod: mean\ngrouping: neighbours\npreset: fast\n"
    (tmp_path / "options.yaml").write_text(options)
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml")
    assert "--layout gqa" in run("export", tmp_path / "out", "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)


def test_biases_that_the_architecture_lacks(tmp_path: Path) -> None:
    """The file was written, and llama.cpp could not load it."""
    model = tiny_model(tmp_path / "model", "qwen3")
    config = AutoConfig.from_pretrained(model, attention_bias=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    said = " ".join(run("export", model, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1).split())
    assert "llama.cpp's architecture qwen3 has no tensor like model.layers.0.self_attn" in said
    assert not (tmp_path / "m.gguf").exists()


def test_other_families_and_numbers_that_f16_does_not_hold(tmp_path: Path) -> None:
    gemma = tiny_model(tmp_path / "gemma", "gemma")
    assert "convert_hf_to_gguf" in run("export", gemma, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    folder = tiny_model(tmp_path / "model")
    weights = headfuse.load(folder)
    with torch.no_grad():
        weights.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    weights.save_pretrained(folder)
    assert "write f32" in run("export", folder, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    export(folder, tmp_path / "m.gguf", "--type", "f32")


def test_a_window_limits_the_context(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf").GGUFReader
    model = tiny_model(tmp_path / "model", "mistral")
    export(model, tmp_path / "m.gguf", "--type", "f32")
    assert reader(tmp_path / "m.gguf").get_field("llama.context_length").contents() == 16
    # n_ctx is asked for; the file only says what the model was made for
    assert_same(model, tmp_path / "m.gguf", length=15)


def test_rows_in_the_order_of_llama_cpp() -> None:
    rows = torch.arange(2 * 8)[:, None]
    expected: Sequence[int] = [0, 4, 1, 5, 2, 6, 3, 7]
    assert gguf.interleave(rows, 2)[:, 0].tolist() == [*expected, *(row + 8 for row in expected)]
