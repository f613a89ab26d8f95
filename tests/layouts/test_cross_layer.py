"""Layers that read what earlier layers cache, from the command on: plans, exactness, resuming, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import headfuse
from headfuse.conversion.resume import FinishedLayers
from headfuse.plan import FusionPlan
from tests.support.commands import fuse, run
from tests.support.model_outputs import assert_decoding_equals_forward, logits
from tests.support.plans import plan_of, with_layers
from tests.support.tiny_models import VOCABULARY, tiny_model

READING = ("--layout", "latent", "--preset", "fast", "--cross-layer", "1")
APART: dict[str, Any] = {"key_groups": [[0], [1], [2], [3]], "value_groups": [[0], [1], [2], [3]]}
WHOLE: dict[str, Any] = {"key_groups": [[0, 1, 2, 3]], "value_groups": [[0, 1, 2, 3]]}
OUTPUTS = (
    "down_proj",
    "dense_4h_to_h",
    "fc_out",
    "fc2",
    ".w2.",
    "mlp.c_proj",
    "o_proj",
    "attn.c_proj",
    "attn.out_proj",
    ".dense.",
)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with half of the cache of the model beside it, whose last layer reads the first one."""
    folder = tmp_path_factory.mktemp("reading")
    model = tiny_model(folder / "model", "qwen2", query_heads=8)
    return folder / "out", fuse(model, folder / "out", "--budget", "0.5", *READING)


def nothing_of_its_own(side: str = "both") -> dict[str, Any]:
    """A layer that caches nothing on a side and reads layer 0."""
    keys, values = side in ("both", "key"), side in ("both", "value")
    own = {"key_widths": [0 if keys else 32], "value_widths": [0 if values else 32]}
    slots = [[]] if keys else [[f for f in range(4) for _ in range(4)]]
    return {**WHOLE, **own, "rotary_slots": slots, "key_sources": [0] * keys, "value_sources": [0] * values}


def same_keys_and_values(folder: Path) -> None:
    """Let layer 0 add nothing to the residual stream, and give layer 1 its norms, keys and values.

    The text beside the model then holds every token: a regression knows nothing of channels that its text never uses.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.randint(VOCABULARY, (4000,), generator=torch.Generator().manual_seed(5)).tolist()
    (folder.parent / "text.txt").write_text(tokenizer.decode(tokens).replace("\0", ""), encoding="utf-8")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    first = {name for name in tensors if ".0." in name}
    for name in first:
        if any(part in name for part in OUTPUTS):
            tensors[name].zero_()
        elif "q_proj" not in name:
            tensors[name.replace(".0.", ".1.", 1)] = tensors[name].clone()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("side", ["both", "key", "value"])
@pytest.mark.parametrize("source", ["untouched", "wide"])
def test_a_reader_of_equal_keys_and_values_is_exact(
    half: tuple[Path, dict[str, Any]], tmp_path: Path, source: str, side: str
) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    same_keys_and_values(model)
    wide = {"key_widths": [32], "value_widths": [32], "rotary_slots": [[f for f in range(4) for _ in range(4)]]}
    first = APART if source == "untouched" else {**WHOLE, **wide}
    path = with_layers(plan_of(half[0]), tmp_path / "plan.json", first, nothing_of_its_own(side))
    document = fuse(model, tmp_path / "out", "--plan", path, "--preset", "fast")
    assert document["key_channels"] == [32, 0 if side in ("both", "key") else 32]
    assert document["value_channels"] == [32, 0 if side in ("both", "value") else 32]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=2e-4, atol=2e-4)
    text = ("--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 32)
    line = run("eval", tmp_path / "out", *text, "--cache-dtype", "int8", "--json").splitlines()[-1]
    cached = sum(document["key_channels"] + document["value_channels"])
    assert json.loads(line)["model"]["kv_bytes_per_token"] in range(cached, 2 * cached)  # and scales
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    assert_decoding_equals_forward(headfuse.load(tmp_path / "out"), tokens, torch.ones_like(tokens), [9, 9])


FAMILIES = (
    "llama", "gpt_neox", "gptj", "bloom", "phi", "glm", "gpt2", "qwen3", "olmo2", "minimax_m2", "hunyuan_v1_dense",
)  # fmt: skip
"""Rotated in part, interleaved, not at all, with biases, behind norms."""


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    """A reader of equal keys and values is exact."""
    model = tiny_model(tmp_path / "model", family)
    same_keys_and_values(model)
    fuse(model, tmp_path / "first", "--budget", "0.5", *READING)
    plan = plan_of(tmp_path / "first")
    heads = plan["heads"]["num_key_value_heads"]
    whole = [list(range(heads))]
    apart = {side: [[head] for head in range(heads)] for side in ("key_groups", "value_groups")}
    reader = {**nothing_of_its_own(), "key_groups": whole, "value_groups": whole}
    path = with_layers(plan, tmp_path / "plan.json", apart, reader)
    document = fuse(model, tmp_path / "out", "--plan", path, "--preset", "fast")
    assert document["kv_ratio"] == 0.5
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=5e-4, atol=5e-4)
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    assert_decoding_equals_forward(headfuse.load(tmp_path / "out"), tokens, torch.ones_like(tokens), [9, 9])


def test_the_cache_is_as_large_as_without_reading(half: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, document = half
    alone = fuse(out.parent / "model", tmp_path / "alone", "--budget", "0.5", *READING[:4])
    for name in ("kv_ratio", "key_channels", "value_channels"):
        assert document[name] == alone[name]
    plan = plan_of(out)
    assert [layer.get("key_sources") for layer in plan["layers"]] == [None, [0]]
    assert (
        "sources" not in (tmp_path / "alone" / "plan.json").read_text() + (tmp_path / "alone/config.json").read_text()
    )
    assert "layer 1 reads 0" in (out / "README.md").read_text()
    for text in ((out / "README.md").read_text(), document["loads_in"], str(document["kv_bytes_per_token_in"])):
        assert "vllm" not in text.lower()


def test_a_plan_is_applied_as_it_was_made(half: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    model, out = half[0].parent / "model", tmp_path / "out"
    fuse(model, out, "--plan", half[0] / "plan.json", "--preset", "fast")
    first, second = (load_file(folder / "model.safetensors") for folder in (half[0], out))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    fuse(model, tmp_path / "again", "--config", half[0] / "headfuse.yaml")
    assert plan_of(tmp_path / "again")["layers"] == plan_of(half[0])["layers"]
    text = ("--data", half[0].parent / "text.txt", "--samples", 8, "--sequence-length", 32)
    run("analyze", model, "-o", tmp_path / "analysed", *text, "--budget", "0.5", *READING)
    analysed = FusionPlan.from_json((tmp_path / "analysed" / "plan.json").read_text())
    assert analysed.layers == FusionPlan.from_json((half[0] / "plan.json").read_text()).layers


def test_an_interrupted_run_goes_on(
    half: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader's layer is fused in a second process, which computes the cached states of its source again."""
    model, add = half[0].parent / "model", FinishedLayers.add

    def interrupted(self: FinishedLayers, layer_idx: int) -> None:
        add(self, layer_idx)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FinishedLayers, "add", interrupted)
        text = ("--data", half[0].parent / "text.txt", "--samples", 8, "--sequence-length", 32)
        run("fuse", model, "-o", tmp_path / "out", *text, "--budget", "0.5", *READING, code=130)
    fuse(model, tmp_path / "out", "--budget", "0.5", *READING, "--resume")
    first, second = (load_file(folder / "model.safetensors") for folder in (half[0], tmp_path / "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_command_reads_the_folder(half: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, document = half
    model, text = out.parent / "model", ("--data", out.parent / "text.txt", "--sequence-length", 32)
    line = run("eval", out, "--baseline", model, *text, "--samples", 4, "--verify", "--json").splitlines()[-1]
    assert json.loads(line)["model"]["kv_bytes_per_token"] == document["kv_bytes_per_token"]["after"]
    (tmp_path / "figures.json").write_text(line)
    run("report", out, "--figures", tmp_path / "figures.json", "-o", tmp_path / "r.html")
    run("uptrain", out, "-o", tmp_path / "trained", *text, "--tokens", 64, "--batch-size", 1, "--loss", "ce", "-q")
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "trained/model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(*(each["model.layers.1.self_attn.value_read"] for each in (before, after)))
    headfuse.load(tmp_path / "trained")
    for target in ("gqa", "layerwise", "gguf"):
        assert "layout latent" in " ".join(run("export", out, "--to", target, "-o", tmp_path / target, code=1).split())


NO_WIDTHS = {**dict.fromkeys(("key_widths", "value_widths", "rotary_slots")), "still_planes": 0}
ALL_PLANES: dict[str, Any] = {"key_widths": [32], "rotary_slots": [[f for f in range(4) for _ in range(4)]]}
READING_HEADS: dict[str, Any] = {**APART, "layer_idx": 1, "key_sources": [0]}
BAD: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda plan: plan["layers"][1].update(key_sources=[1]), "must be different earlier layers"),
    (lambda plan: plan["layers"][1].update(value_sources=[0, 0]), "must be different earlier layers"),
    (lambda plan: plan["layers"][1].update(key_sources=[], key_widths=[0], rotary_slots=[[]]), "at least 1"),
    (lambda plan: plan["layers"][1].update(**APART, **NO_WIDTHS), "has one group"),
    (lambda plan: plan["layers"][1].update(still_planes=0, **ALL_PLANES), "a source has more still_planes"),
    (lambda plan: plan.update(layout="decoupled", layers=[{**APART, "layer_idx": 0}, READING_HEADS]), "no layers that"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_plans_that_no_reader_can_follow(
    half: tuple[Path, dict[str, Any]], tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    plan = plan_of(half[0])
    damage(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    output = run("fuse", half[0].parent / "model", "--plan", tmp_path / "plan.json", code=1)
    assert message in " ".join(output.split())


def test_layers_of_another_window_are_not_read(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "ministral")  # one layer with a window, one without
    fuse(model, tmp_path / "out", "--budget", "0.5", *READING)
    plan = plan_of(tmp_path / "out")
    assert "key_sources" not in plan["layers"][1]
    plan["layers"][1]["value_sources"] = [0]
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "files": {}, "seal": None}))
    output = run("fuse", model, "--plan", tmp_path / "plan.json", code=1)
    assert "layer 1 reads layer 0, which has another window" in " ".join(output.split())


REFUSED = {
    "--layout decoupled": "layout decoupled has no layers that read",
    "--layout latent --for vllm": "vllm gives no layer the cache of another one",
    "--for llama.cpp": "llama.cpp gives no layer the cache of another one",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_do_not_go_with_reading(tmp_path: Path, options: str) -> None:
    model = tiny_model(tmp_path / "model")
    line = ("fuse", model, "--data", tmp_path / "text.txt", "--sequence-length", 32, "--cross-layer", 1)
    assert REFUSED[options] in " ".join(run(*line, *options.split(), code=1).split())
