"""The contract of a table entry: one tiny random model of every family, in every layout that exists for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import headfuse
from headfuse.errors import UnsupportedModelError
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS, slot_table
from headfuse.layouts.gguf import writer as gguf
from headfuse.models.attention import READ_MAPS, WRITE_MAPS, AttentionWeights
from headfuse.models.families import ARCHITECTURES
from headfuse.models.heads import head_layout
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from tests.support.commands import fuse, run
from tests.support.model_outputs import assert_decoding_equals_forward, logits
from tests.support.planted_heads import plant
from tests.support.tiny_models import FAMILY_OPTIONS, VOCABULARY, tiny_config, tiny_model


def exists(layout: str, family: str) -> bool:
    try:
        LAYOUTS[layout].check(tiny_config(family))
    except UnsupportedModelError:
        return False
    return True


CASES = [(family, layout) for family in sorted(ARCHITECTURES) for layout in LAYOUTS if exists(layout, family)]
families = pytest.mark.parametrize("family", sorted(ARCHITECTURES))
KINDS = (
    "qwen3", "olmo2", "minimax_m2", "hunyuan_v1_dense", "phi", "cohere", "phi3", "gpt_neox", "gpt2", "gptj", "bloom",
)  # fmt: skip
"""One family of each kind of key: behind a norm of a head, of a layer, of one with channels that are not rotated,
rotated before a norm, rotated in part, interleaved, with a bias by distance; and packed."""


@dataclass(frozen=True)
class Fused:
    family: str
    layout: str
    model: Path
    out: Path
    document: dict[str, Any]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fused:
    """A model with planted pairs of heads, and what is left of it at half of its cache."""
    family, layout = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{layout}")
    query_heads = 8 if ARCHITECTURES[family].stock_gqa else 4
    model = tiny_model(folder / "model", family, query_heads=query_heads)
    plant(model, [[0, 3], [1, 2]])
    (model / "generation_config.json").unlink()  # as in older repositories: config.json alone names the EOS
    document = fuse(model, folder / "out", "--budget", "1/2", "--layout", layout, "--preset", "fast")
    return Fused(family, layout, model, folder / "out", document)


def test_planted_groups_are_lossless(fused: Fused) -> None:
    assert fused.document["kv_ratio"] == 0.5
    rounding = 5e-5 if LAYOUTS[fused.layout].wide else 2e-5  # read maps are one product more
    torch.testing.assert_close(logits(fused.out), logits(fused.model), rtol=rounding, atol=rounding)


@families
def test_streamed_logits_are_the_models(family: str, tmp_path: Path) -> None:
    """What refinement, probes and gradients take for the source's output is its output."""
    model = tiny_model(tmp_path / "model", family)
    source, tokens = Source.open(str(model)), torch.arange(3, 35)[None]
    streamed = StreamedModel(source.checkpoint, source.config, torch.device("cpu"))
    states = streamed.embed(tokens)
    for layer_idx in range(streamed.num_layers):
        with streamed.layer(layer_idx, streamed.layer_tensors(layer_idx)) as run_layer:
            states = run_layer(states)
    with torch.no_grad():
        have, want = streamed.logits(streamed.last_hidden_state(states.hidden)), headfuse.load(model)(tokens).logits
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, "decoupled") for family in sorted(ARCHITECTURES)),
        *((family, "latent") for family in ("gpt2", "phi", "qwen3", "olmo2", "hunyuan_v1_dense")),
    ],
)
def test_every_family_is_refined(family: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default preset: probes and refinement run the source's own head and the fused model's own layers."""
    monkeypatch.setattr(
        "headfuse.conversion.refine.NEGLIGIBLE_NLL", -1.0
    )  # what a random model says is no better than chance
    model = tiny_model(tmp_path / "model", family)
    text = ("--samples", 6, "--sequence-length", 48)
    document = fuse(model, tmp_path / "out", "--budget", "1/2", "--layout", layout, "--preset", "balanced", *text)
    assert [stage["name"] for stage in document["stages"]] == ["closed form", "refined"]


def test_output_reloads_with_the_promised_cache(fused: Fused) -> None:
    import headfuse.modeling  # noqa: F401  registers decoupled models

    loaded, report = AutoModelForCausalLM.from_pretrained(fused.out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    source = AutoModelForCausalLM.from_pretrained(fused.model)
    assert loaded.generation_config.eos_token_id == source.generation_config.eos_token_id == 0
    with torch.no_grad():
        cache = loaded(torch.randint(300, (1, 12)), use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == fused.document["key_heads"]
    assert [layer.values.shape[1] for layer in cache.layers] == fused.document["value_heads"]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 12 * fused.document["kv_bytes_per_token"]["after"]


def test_cached_decoding_equals_the_full_pass(fused: Fused) -> None:
    loaded, lengths, width = headfuse.load(fused.out), [24, 19, 3], 24
    mask = torch.tensor([[int(i >= width - length) for i in range(width)] for length in lengths])
    tokens = torch.randint(1, 300, (3, width), generator=torch.Generator().manual_seed(0)) * mask
    assert_decoding_equals_forward(loaded, tokens, mask, lengths)
    greedy = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(*(loaded.generate(tokens, use_cache=cached, **greedy) for cached in (True, False)))


@pytest.mark.parametrize("to", ["gqa", "layerwise", "gguf"])
def test_export_computes_the_same_or_is_refused(fused: Fused, tmp_path: Path, to: str) -> None:
    out, command = tmp_path / "out", ("export", fused.out, "--to", to, "-o", tmp_path / "out")
    if LAYOUTS[fused.layout].wide and to == "gqa" and fused.family in slot_table.FAMILIES:
        assert json.loads(run(*command, "--json").splitlines()[-1])["num_key_value_heads"] == [1, 1]
        assert AutoConfig.from_pretrained(out).model_type == fused.family
        torch.testing.assert_close(logits(out), logits(fused.out), rtol=1e-4, atol=1e-4)
        return
    if LAYOUTS[fused.layout].wide:
        assert "are wide (layout latent)" in " ".join(run(*command, code=1).split())
        assert not out.exists()
        return
    supported = fused.family in gguf.FAMILIES if to == "gguf" else exists(to, fused.family) and to != fused.layout
    if not supported:
        reason = f"layout {to} already" if to == fused.layout else f"model_type '{fused.family}'"
        output = " ".join(run(*command, code=1).split())
        assert reason in output or "attend to all tokens" in output
        assert not out.exists()
        return
    if to == "gguf":
        pytest.importorskip("xllamacpp", reason="the wheel xllamacpp (llama.cpp) is not installed")
        from tests.support.llama_cpp import assert_same

        run(*command, "--type", "f32")
        assert_same(fused.out, out, length=12)
        return
    document = json.loads(run(*command, "--json").splitlines()[-1])
    assert document["num_key_value_heads"] == [2, 2]
    assert document["kv_ratio"] == 0.5
    config = AutoConfig.from_pretrained(out)
    assert config.model_type == (fused.family if to == "gqa" else "nemotron-nas")
    torch.testing.assert_close(logits(out), logits(fused.out), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "module"), [("bloom", "self_attention.query_key_value"), ("gptj", "attn.q_proj")])
def test_a_missing_tensor_is_named_as_the_checkpoint_names_it(tmp_path: Path, family: str, module: str) -> None:
    model = tiny_model(tmp_path / "model", family, query_heads=4)
    tensors = load_file(model / "model.safetensors")
    del tensors[f"transformer.h.1.{module}.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = run("fuse", model, "-o", tmp_path / "out", "--sequence-length", 32, code=1)
    assert f"tensor transformer.h.1.{module}.weight is missing" in " ".join(message.split())
    assert "more)" not in message


def test_a_step_of_uptraining_changes_the_attention(fused: Fused, tmp_path: Path) -> None:
    text = ("--data", fused.model.parent / "text.txt", "--tokens", 128, "--sequence-length", 32, "--batch-size", 2)
    run("uptrain", fused.out, "-o", tmp_path / "out", "--loss", "ce", *text, "-q")
    before, after = load_file(fused.out / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    prefix = ARCHITECTURES[fused.family].attention_prefix(1)
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith(prefix))


@pytest.mark.parametrize("layout", ["decoupled", "gqa"])
def test_a_model_with_sliding_windows_in_some_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    monkeypatch.setitem(FAMILY_OPTIONS, "qwen2", sliding)
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    plant(model, [[0, 3], [1, 2]])
    fuse(model, tmp_path / "out", "--budget", "1/2", "--layout", layout, "--preset", "fast")
    assert headfuse.load(tmp_path / "out").config.layer_types == ["full_attention", "sliding_attention"]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def untouched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fused:
    """A model with every dropout that its family has, and what fuse makes of it at its full cache."""
    family, layout = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{layout}")
    model = tiny_model(folder / "model", family)
    config = json.loads((model / "config.json").read_text())
    rates = {name: 0.2 for name, value in config.items() if "drop" in name and type(value) in (int, float)}
    (model / "config.json").write_text(json.dumps(config | rates))
    quick = ("--samples", 2, "--allocator", "uniform", "--preset", "fast")
    document = fuse(model, folder / "out", "--budget", 1, "--layout", layout, *quick)
    return Fused(family, layout, model, folder / "out", document)


def test_full_budget_copies_bit_for_bit(untouched: Fused) -> None:
    model, out, layout = untouched.model, untouched.out, untouched.layout
    source, copied = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    arch, heads = ARCHITECTURES[untouched.family], head_layout(AutoConfig.from_pretrained(model))
    stored = LAYOUTS[layout].stored(arch)
    names = arch.model_names(source)
    source = {name if stored == arch else names[name]: tensor for name, tensor in source.items()}
    for layer_idx in range(heads.num_hidden_layers):
        prefix = arch.layer_prefix(layer_idx) + "."
        layer = {name.removeprefix(prefix): source.pop(name) for name in list(source) if name.startswith(prefix)}
        weights = AttentionWeights.of_layer(layer, arch, heads)
        source |= {prefix + n: t for n, t in weights.in_layer(layer, arch, heads, stored).items()}
    assert source.keys() == {name for name in copied if not name.endswith(WRITE_MAPS + READ_MAPS)}
    assert all(torch.equal(source[name], copied[name]) for name in source)
    if stored == arch:
        assert torch.equal(logits(model), logits(out))
    else:  # three products in the place of one may be summed in another order
        torch.testing.assert_close(logits(model), logits(out), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_mode_drops_out_what_the_source_drops_out(untouched: Fused, attention: str) -> None:
    """Under one seed: attention weights, residual stream, hidden states."""
    import headfuse.modeling  # noqa: F401  registers decoupled models

    if attention == "sdpa" and untouched.family in ("bloom", "gemma2", "gpt_oss", "gptj", "vaultgemma"):
        pytest.skip("the source's class has eager attention alone")
    tokens, outputs = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2)), []
    for folder in (untouched.model, untouched.out):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).train()
        torch.manual_seed(0)
        outputs.append(model(tokens).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    rates = [name for name in json.loads((untouched.model / "config.json").read_text()) if "drop" in name]
    if rates:  # ernie4_5 has no dropout
        assert not torch.allclose(outputs[0], logits(untouched.model), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", [name for name, method in FUSION_METHODS.items() if not method.trained])
@pytest.mark.parametrize("family", [family for family in KINDS if family in ARCHITECTURES])
def test_every_method_fuses_every_kind_of_key(tmp_path: Path, family: str, method: str) -> None:
    """Unequal groups of unrelated heads: a finite model that is not the source."""
    layout = "decoupled" if exists("decoupled", family) else "gqa"
    model = tiny_model(tmp_path / "model", family)
    fuse(model, tmp_path / "out", "-b", "1/2", "--layout", layout, "--method", method, "--preset", "fast")
    result = logits(tmp_path / "out")
    assert torch.isfinite(result).all()
    assert not torch.allclose(result, logits(model), atol=1e-3)


@families
def test_stored_weights_survive_the_round_trip(tmp_path: Path, family: str) -> None:
    tensors = load_file(tiny_model(tmp_path / "model", family) / "model.safetensors")
    arch, heads = ARCHITECTURES[family], head_layout(AutoConfig.from_pretrained(tmp_path / "model"))
    prefix = arch.layer_prefix(0) + "."
    layer = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    weights = AttentionWeights.of_layer(layer, arch, heads)
    assert weights.query.shape[:2] == weights.key.shape[:2] == weights.value.shape[:2] == (4, 8)
    again = weights.in_layer(layer, arch, heads)
    assert again.keys() == layer.keys()
    assert all(torch.equal(again[name], layer[name]) for name in layer)
