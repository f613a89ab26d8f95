"""`headfuse export --to gqa|layerwise`: the same function in another layout, or a refusal that says what avoids it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from headfuse.plan import FusionPlan
from tests.support.commands import fuse, run
from tests.support.model_outputs import in_transformers, logits
from tests.support.plans import plan_of, with_layers
from tests.support.tiny_models import tiny_model

Groups = Sequence[Sequence[int]]
ALONE: Groups = [[0], [1], [2], [3]]
PAIRS, ALL, UNEQUAL = [[0, 2], [1, 3]], [[0, 1, 2, 3]], [[0, 1, 2], [3]]


def planned(
    folder: Path,
    layers: Sequence[tuple[Groups, Groups]],
    family: str = "llama",
    method: str = "subspace",
    layout: str = "decoupled",
    kv_heads: int = 4,
) -> Path:
    """A fused folder with these key groups and value groups."""
    model = tiny_model(folder / "model", family, kv_heads, query_heads=8, layers=len(layers))
    config = json.loads((model / "config.json").read_text())
    config.update(sliding_window=None, use_sliding_window=False)
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    quick = ("--preset", "fast", "--samples", 2, "--method", method, "--layout", layout)
    fuse(model, folder / "full", "--budget", 1, "--allocator", "uniform", *quick)
    plan = json.loads((folder / "full/plan.json").read_text())
    plan["layers"] = [
        {"layer_idx": i, "key_groups": keys, "value_groups": values} for i, (keys, values) in enumerate(layers)
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    fuse(model, folder / "fused", "--plan", folder / "plan.json", *quick)
    return folder / "fused"


def exported(folder: Path, to: str, out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run("export", folder, "--to", to, "-o", out, "--json").splitlines()[-1])
    return document


def counts(folder: Path) -> list[int]:
    """KV heads of each layer, by the shape of the stored keys."""
    tensors = load_file(folder / "model.safetensors")
    return [len(tensor) // 8 for name, tensor in sorted(tensors.items()) if name.endswith("k_proj.weight")]


@pytest.mark.parametrize(
    ("layers", "each", "common", "family"),
    [
        ([(PAIRS, PAIRS), (ALL, ALL)], [2, 1], 2, "qwen2"),
        ([(ALL, PAIRS), (PAIRS, ALL)], [2, 2], 2, "llama"),
        ([(PAIRS, PAIRS), ([[0, 1], [2, 3]], ALL)], [2, 2], 2, "qwen2"),
        ([(ALL, ALL), (ALONE, ALONE)], [1, 4], None, "llama"),
        ([(ALL, ALL), (UNEQUAL, UNEQUAL)], [1, 4], None, "qwen2"),
        ([(ALL, ALL), (PAIRS, [[0, 1], [2, 3]])], [1, 4], None, "llama"),
    ],
)
def test_exports_compute_the_same(
    tmp_path: Path, layers: list[tuple[Groups, Groups]], each: list[int], common: int | None, family: str
) -> None:
    folder = planned(tmp_path, layers, family)
    expected = logits(folder)
    for to, wanted in (("layerwise", each), ("gqa", common and [common] * 2)):
        out = tmp_path / to
        if wanted is None:
            message = run("export", folder, "--to", to, "-o", out, code=1)
            assert "groups of one size" in message
            assert "--layout gqa" in message
            assert not out.exists()
            continue
        document = exported(folder, to, out)
        assert document["num_key_value_heads"] == counts(out) == wanted
        assert document["kv_bytes_per_token"]["after"] == 2 * sum(wanted) * 8 * 4
        torch.testing.assert_close(logits(out), expected, rtol=1e-5, atol=1e-5)
        plan = FusionPlan.from_json((out / "plan.json").read_text())
        assert plan.layout == to
        assert list(plan.head_budget.key_heads) == wanted
        assert document["kv_ratio"] == plan.kv_ratio
        assert plan.files["model.safetensors"]
        assert "Exported" in (out / "README.md").read_text()
    if common is not None:
        (tmp_path / "again").mkdir()
        document = exported(tmp_path / "layerwise", "gqa", tmp_path / "again/gqa")
        assert document["num_key_value_heads"] == [common] * 2
        torch.testing.assert_close(logits(tmp_path / "again/gqa"), expected, rtol=1e-5, atol=1e-5)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "again/gqa")
        assert type(stock).__module__ == f"transformers.models.{family}.modeling_{family}"
        source = AutoConfig.from_pretrained(tmp_path / "model").to_dict()
        kept = stock.config.to_dict()
        differ = {name for name in source if source[name] != kept.get(name)}
        assert differ <= {"num_key_value_heads", "transformers_version", "_name_or_path", "use_sliding_window"}


@pytest.mark.parametrize("family", ["cohere", "olmo2", "phi3", "qwen3"])  # channels in pairs, norms, one projection
def test_families_that_store_their_heads_otherwise(tmp_path: Path, family: str) -> None:
    folder = planned(tmp_path, [(PAIRS, PAIRS), (ALL, PAIRS)], family)
    assert exported(folder, "gqa", tmp_path / "out")["num_key_value_heads"] == [2, 2]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "qwen3_moe"])
def test_experts_are_stored_as_the_stock_layout_has_them(tmp_path: Path, family: str) -> None:
    """The folder holds them stacked, as modules of transformers do; runtimes read the names of released checkpoints."""
    model, quick = tiny_model(tmp_path / "model", family, query_heads=8), ("--preset", "fast", "--method", "mean")
    fuse(model, tmp_path / "gqa", "--layout", "gqa", "--budget", "1/2", *quick)
    plan = {**plan_of(tmp_path / "gqa"), "layout": "decoupled"}
    fuse(model, tmp_path / "decoupled", "--plan", with_layers(plan, tmp_path / "plan.json", *plan["layers"]), *quick)
    exported(tmp_path / "decoupled", "gqa", tmp_path / "out")
    stacked, source, stock, out = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("decoupled", "model", "gqa", "out")
    )
    assert out.keys() == stock.keys() == source.keys()
    assert out.keys() - stacked.keys(), "the folder has other names"
    for name in out:
        torch.testing.assert_close(out[name], stock[name], rtol=1e-6, atol=1e-6)
        if ".self_attn." not in name:
            assert torch.equal(out[name], source[name]), name
    torch.testing.assert_close(in_transformers(tmp_path / "out"), logits(tmp_path / "decoupled"), rtol=1e-4, atol=1e-4)


def test_a_norm_over_all_keys_needs_each_of_them_as_often(tmp_path: Path) -> None:
    keys, values = [[0, 1, 2, 3], [4, 5], [6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]
    folder = planned(tmp_path, [(keys, values)], "olmo2", kv_heads=8)
    assert "norm runs over all key heads" in run("export", folder, "--to", "gqa", "-o", tmp_path / "out", code=1)


@pytest.mark.parametrize("layout", ["decoupled", "layerwise"])
def test_the_plan_of_an_export_says_which_source_heads_its_heads_are(tmp_path: Path, layout: str) -> None:
    """Where the first head of a group stands for it, each key of the export is that of the source in the plan."""
    folder = planned(tmp_path, [(PAIRS, PAIRS), (ALL, ALL)], method="first", layout=layout)
    exported(folder, "gqa", tmp_path / "out")
    before, plan = (FusionPlan.from_json((f / "plan.json").read_text()) for f in (folder, tmp_path / "out"))
    source, out = (load_file(f / "model.safetensors") for f in (tmp_path / "model", tmp_path / "out"))
    for fused, layer in zip(before.layers, plan.layers, strict=True):
        name = f"model.layers.{layer.layer_idx}.self_attn.k_proj.weight"
        assert len(layer.key_groups) == 2
        for head, group in enumerate(layer.key_groups):
            (whole,) = (g for g in fused.key_groups if set(group) <= set(g))
            assert torch.equal(out[name].view(2, 8, -1)[head], source[name].view(4, 8, -1)[whole[0]])


def test_a_stock_model_becomes_layerwise(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", query_heads=8)
    assert exported(model, "layerwise", tmp_path / "out")["num_key_value_heads"] == [4, 4]
    assert torch.equal(logits(tmp_path / "out"), logits(model))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_config_without_head_dim_becomes_layerwise(tmp_path: Path, family: str) -> None:
    """Released models of qwen2 name none, and its config class has no such field."""
    model = tiny_model(tmp_path / "model", family)
    config = json.loads((model / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("head_dim", "sliding_window")}
    (model / "config.json").write_text(json.dumps(config))
    exported(model, "layerwise", tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(model))


def test_fields_of_the_fused_config_hide_those_of_the_source(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", query_heads=8)
    options = ("--layout", "decoupled", "--allocator", "uniform", "--preset", "fast")
    fuse(model, tmp_path / "fused", "--budget", 1, *options)
    config = json.loads((tmp_path / "fused/config.json").read_text())
    config |= {"rms_norm_eps": 0.1, "max_position_embeddings": 256}
    (tmp_path / "fused/config.json").write_text(json.dumps(config))
    exported(tmp_path / "fused", "gqa", tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "fused"))
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 256
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    resized.resize_token_embeddings(resized.config.vocab_size + 8)
    resized.save_pretrained(tmp_path / "resized")
    for name in ("plan.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "fused" / name, tmp_path / "resized" / name)
    exported(tmp_path / "resized", "gqa", tmp_path / "larger")
    torch.testing.assert_close(logits(tmp_path / "larger"), logits(tmp_path / "resized"))


def test_the_tokenizer_stays_of_its_class(tmp_path: Path) -> None:
    """transformers picks some classes by the model type, which is another one in this layout."""
    model = tiny_model(tmp_path / "model", query_heads=8)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    name = settings.pop("tokenizer_class")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    exported(model, "layerwise", tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["tokenizer_class"] == name


def test_a_tokenizer_whose_class_only_the_model_type_tells(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    (model / "tokenizer_config.json").unlink()
    exported(model, "layerwise", tmp_path / "out")
    fuse(model, tmp_path / "latent", "--layout", "latent", "--budget", "1/2", "--preset", "fast")
    before = AutoTokenizer.from_pretrained(model)
    assert before.eos_token is not None
    for folder in ("out", "latent"):
        after = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert type(after) is type(before)
        assert after.special_tokens_map == before.special_tokens_map
        assert after("the head").input_ids == before("the head").input_ids
    (model / "tokenizer.json").unlink()
    exported(model, "layerwise", tmp_path / "without")
    assert not (tmp_path / "without/tokenizer_config.json").exists(), "there is no tokenizer"


def test_the_dtype_stays(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", query_heads=8)
    fuse(model, tmp_path / "fused", "--budget", 0.5, "--layout", "layerwise", "--preset", "fast", "--dtype", "bfloat16")
    exported(tmp_path / "fused", "gqa", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_the_dtype_is_that_of_the_trained_weights(tmp_path: Path) -> None:
    folder = planned(tmp_path, [(PAIRS, PAIRS)], method="mean")
    training = ("--loss", "ce", "--tokens", 64, "--sequence-length", 16, "--batch-size", 1, "--dtype", "bfloat16")
    run("uptrain", folder, "--data", tmp_path / "text.txt", *training, "-o", tmp_path / "trained")
    exported(tmp_path / "trained", "gqa", tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: config[name] for name in ("dtype", "torch_dtype") if name in config} == {"dtype": "bfloat16"}


@pytest.mark.parametrize("architectures", [{}, {"architectures": None}])
def test_a_config_that_names_no_class(tmp_path: Path, architectures: dict[str, None]) -> None:
    model, quick = tiny_model(tmp_path / "model", "qwen2", query_heads=8), ("--preset", "fast", "--method", "mean")
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config | architectures))
    fuse(model, tmp_path / "gqa", "--layout", "gqa", "--budget", "1/2", *quick)
    plan = {**plan_of(tmp_path / "gqa"), "layout": "decoupled"}
    fuse(model, tmp_path / "decoupled", "--plan", with_layers(plan, tmp_path / "plan.json", *plan["layers"]), *quick)
    assert exported(tmp_path / "decoupled", "gqa", tmp_path / "out")["architecture"] == "Qwen2ForCausalLM"
    for folder in ("gqa", "out"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


def test_what_will_be_written_is_said_before_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = planned(tmp_path, [(ALL, PAIRS)])

    def fail(*args: object, **options: object) -> None:
        raise OSError("no writing")

    monkeypatch.setattr("headfuse.conversion.export.output_folder", fail)
    message = run("export", folder, "--to", "gqa", "-o", tmp_path / "out", code=1)
    assert "LlamaForCausalLM, KV heads per layer: 2" in message
    assert "KV bytes per token: 96 -> 128" in message
    assert "The cache grows" in message


def test_rotary_slots_are_refused_with_the_layouts_that_have_none(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", query_heads=8)
    fuse(model, tmp_path / "fused", "--budget", "0.5", "--preset", "fast")
    assert json.loads((tmp_path / "fused/config.json").read_text())["rotary_slots"]
    for to in ("gqa", "layerwise", "gguf"):
        message = run("export", tmp_path / "fused", "--to", to, "-o", tmp_path / "out", code=1)
        assert "rotary slots" in message
        assert "--layout gqa" in message
        assert not (tmp_path / "out").exists()


def test_other_refusals(tmp_path: Path) -> None:
    model, out = tiny_model(tmp_path / "model", "mistral"), tmp_path / "out"
    assert "layout gqa already" in run("export", model, "--to", "gqa", "-o", out, code=1)
    assert "the last 16" in run("export", model, "--to", "layerwise", "-o", out, code=1)
    assert "--type" in run("export", model, "--to", "layerwise", "--type", "f16", "-o", out, code=1)
    assert "no such folder" in run("export", tmp_path / "nothing", "--to", "gqa", code=1)
    run("export", model, "--to", "onnx", code=2)
    run("export", model, code=2)
    assert not out.exists()
    llama = tiny_model(tmp_path / "llama")
    out.mkdir()
    (out / "mine").write_text("")
    assert "already exists" in run("export", llama, "--to", "layerwise", "-o", out, code=1)
    assert "never touched" in run("export", llama, "--to", "layerwise", "-o", llama, code=1)
    assert (out / "mine").exists()
