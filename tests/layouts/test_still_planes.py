"""Rotary planes that hardly turn: wide heads that read them as channels of any other kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import headfuse
from headfuse.fusion.key_channels import KeyChannels
from headfuse.models.rope import STILL, slow_planes, turns
from tests.layouts.test_cross_layer import APART, WHOLE, nothing_of_its_own, same_keys_and_values
from tests.support.commands import fuse, run
from tests.support.model_outputs import assert_decoding_equals_forward, logits
from tests.support.plans import plan_of, with_layers
from tests.support.planted_heads import plant
from tests.support.tiny_models import VOCABULARY, tiny_config, tiny_model

LATENT = ("--layout", "latent", "--preset", "fast", "--budget", "0.5")


FAMILIES = (
    "llama", "qwen2", "cohere", "glm", "phi", "gpt_neox", "granite", "qwen3", "olmo2", "minimax_m2", "hunyuan_v1_dense",
)  # fmt: skip
"""Half-split, biased, interleaved, rotated in part, behind norms of a head and of a layer, rotated before a norm."""


def slow_model(folder: Path, family: str, **options: int) -> Path:
    """A tiny model whose planes turn by 1, 3e-4, 1e-7 and 3e-11 radians per token, or fewer planes likewise."""
    tiny_model(folder, family, **options)  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e14
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def still_layer(plan: dict[str, Any], still: int) -> dict[str, Any]:
    """A layer that caches all channels of all heads, with this number of still planes."""
    heads = plan["heads"]
    n, planes = heads["num_key_value_heads"], heads["rotary_dim"] // 2 - still
    whole, width = [list(range(n))], [n * heads["head_dim"]]
    slots = [[plane for plane in range(planes) for _ in range(n)]]
    sides = {"key_groups": whole, "value_groups": whole, "key_widths": width, "value_widths": width}
    return {**sides, "rotary_slots": slots, "still_planes": still}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_width_is_the_source(tmp_path: Path, family: str) -> None:
    """With planes that do not turn in a text of this length."""
    model = slow_model(tmp_path / "model", family)
    fuse(model, tmp_path / "first", *LATENT)
    plan = plan_of(tmp_path / "first")
    still = plan["heads"]["rotary_dim"] // 4
    path = with_layers(plan, tmp_path / "plan.json", still_layer(plan, still), still_layer(plan, 0))
    fuse(model, tmp_path / "out", "--plan", path, "--preset", "fast")
    assert plan_of(tmp_path / "out")["layers"][0]["still_planes"] == still
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=5e-4, atol=5e-4)
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    assert_decoding_equals_forward(headfuse.load(tmp_path / "out"), tokens, torch.ones_like(tokens), [9, 9])


@pytest.mark.parametrize("source", ["untouched", "turning", "still"])
@pytest.mark.parametrize("side", ["both", "key", "value"])
def test_a_reader_of_equal_keys_and_values_is_exact(tmp_path: Path, source: str, side: str) -> None:
    """Slots that its source turns and the reader does not are channels like all others to it."""
    model = slow_model(tmp_path / "model", "qwen2", query_heads=8)
    same_keys_and_values(model)
    fuse(model, tmp_path / "first", *LATENT)
    plan = plan_of(tmp_path / "first")
    reader = nothing_of_its_own(side)
    slots = [[f for f in table if f < 2] for table in reader["rotary_slots"]]
    reader |= {"still_planes": 2, "rotary_slots": slots}
    first = APART if source == "untouched" else still_layer(plan, 2 if source == "still" else 0)
    path = with_layers(plan, tmp_path / "plan.json", first, {**WHOLE, **reader})
    fuse(model, tmp_path / "out", "--plan", path, "--preset", "fast")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=5e-4, atol=5e-4)
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    assert_decoding_equals_forward(headfuse.load(tmp_path / "out"), tokens, torch.ones_like(tokens), [9, 9])


def test_slow_planes_are_still_where_that_loses_less(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    slow = len(slow_planes(AutoConfig.from_pretrained(model), 0))
    assert slow == 1
    fuse(model, tmp_path / "out", *LATENT)
    assert {layer.get("still_planes") for layer in plan_of(tmp_path / "out")["layers"]} == {slow}
    fuse(model, tmp_path / "reading", *LATENT, "--cross-layer", "1")
    assert {layer.get("still_planes") for layer in plan_of(tmp_path / "reading")["layers"]} == {slow}


def test_heads_that_fuse_without_loss_turn_all_planes(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    plant(model, [[0, 1, 2, 3]])
    fuse(model, tmp_path / "out", *LATENT)
    assert not any("still_planes" in layer for layer in plan_of(tmp_path / "out")["layers"])
    assert "still_planes" not in (tmp_path / "out/config.json").read_text()


def test_a_model_for_shorter_texts_has_more_still_planes(tmp_path: Path) -> None:
    """Its config says how long they may be, and so does its plan."""
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    fuse(model, tmp_path / "out", *LATENT, "--max-positions", "32")
    plan = plan_of(tmp_path / "out")
    assert plan["max_positions"] == 32
    assert {layer["still_planes"] for layer in plan["layers"]} == {2}
    assert headfuse.load(tmp_path / "out").config.max_position_embeddings == 32
    by_plan = ("--plan", tmp_path / "out/plan.json", "--preset", "fast")
    fuse(model, tmp_path / "again", *by_plan)
    assert plan_of(tmp_path / "again")["layers"] == plan["layers"]
    assert headfuse.load(tmp_path / "again").config.max_position_embeddings == 32
    line = ("fuse", model, *by_plan, "--max-positions", 64, "--sequence-length", 32)
    assert "contradict the plan in max_positions" in " ".join(run(*line, code=1).split())
    fuse(model, tmp_path / "whole", *LATENT)
    assert "max_positions" not in plan_of(tmp_path / "whole")


REFUSED = {
    "--max-positions 129": "the model has 128 positions",
    "--max-positions 31": "32 is longer than the fused model's 31 positions",
    "--max-positions 64 --layout decoupled": "layout decoupled turns every rotary plane",
}


@pytest.mark.parametrize("options", REFUSED)
def test_positions_that_do_not_fit(tmp_path: Path, options: str) -> None:
    model = tiny_model(tmp_path / "model")
    line = ("fuse", model, "--data", tmp_path / "text.txt", "--sequence-length", 32, *options.split())
    assert REFUSED[options] in " ".join(run(*line, code=1).split())


def test_a_folder_whose_planes_do_not_fit_does_not_load(tmp_path: Path) -> None:
    fuse(tiny_model(tmp_path / "model"), tmp_path / "out", *LATENT)
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "still_planes": [1, 5]}))
    output = run("eval", tmp_path / "out", "--data", tmp_path / "text.txt", "--sequence-length", 32, code=1)
    assert "still_planes[1]: must be from 0 to 4, not 5" in " ".join(output.split())


def test_slow_planes_of_a_config() -> None:
    config = tiny_config("llama")
    found = slow_planes(config, 0)
    assert found == pytest.approx([(128 * 1e4**-0.75) ** 2 / (2 * math.log(128))])
    assert 128 * 1e4**-0.75 <= STILL < 128 * 1e4**-0.5
    config.max_position_embeddings = 1024
    assert slow_planes(config, 0) == []


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 8.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_planes_that_depend_on_the_length_or_are_scaled_are_not_slow(rope: dict[str, Any]) -> None:
    config = tiny_config("llama")
    rope = {"rope_theta": 1e4, "original_max_position_embeddings": 64, **rope}
    config.rope_parameters = rope
    assert slow_planes(config, 0) == []
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    assert slow_planes(config, 0) == pytest.approx([(64 * 1e4**-0.75) ** 2 / (2 * math.log(128))])


def test_families_without_rotary_planes_have_no_slow_ones() -> None:
    assert [slow_planes(tiny_config(family), 0) for family in ("opt", "bloom", "gptj")] == [[], [], []]


@pytest.mark.parametrize(("rotated", "still"), [(8, 0), (8, 1), (8, 4), (4, 1), (0, 0)])
def test_channels_divide_and_join(rotated: int, still: int) -> None:
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    channels = KeyChannels(rotated, still)
    turning, rest = channels.split(x)
    assert (turning.shape[-1], rest.shape[-1]) == (channels.planes, 12 - 2 * channels.planes)
    torch.testing.assert_close(channels.join(turning, rest), x, rtol=0, atol=0)
    ordered = x[..., channels.order(12)]
    torch.testing.assert_close(torch.cat([turning.real, turning.imag, rest], -1), ordered, rtol=0, atol=0)


def test_a_layer_with_a_window_has_the_slow_planes_of_that_window() -> None:
    """Two tokens further apart than its window never meet; gemma3's layers also have frequencies of their own."""
    config = tiny_config("gemma3_text")
    assert config.layer_types == ["sliding_attention", "full_attention"]
    local, everywhere = (config.rope_parameters[kind]["rope_theta"] for kind in config.layer_types)
    for layer_idx, (theta, positions) in enumerate([(local, 16), (everywhere, config.max_position_embeddings)]):
        turns = [positions * theta ** (-2 * plane / 8) for plane in range(4)]
        wanted = [turn**2 / (2 * math.log(positions)) for turn in turns if turn <= STILL]
        assert slow_planes(config, layer_idx) == pytest.approx(wanted)
    assert len(slow_planes(config, 0)) == 2
    assert len(slow_planes(config, 0, positions=4)) == 3 > len(slow_planes(tiny_config("mistral"), 1))
    config.sliding_window = None
    assert slow_planes(config, 0) == slow_planes(config, 1)


@pytest.mark.parametrize("family", ["smollm3", "cohere2", "exaone4"])
def test_layers_without_rope_have_still_planes_alone(tmp_path: Path, family: str) -> None:
    """Any linear map may mix their channels; only layers of their own kind read them."""
    model = tiny_model(tmp_path / "model", family, layers=4, query_heads=8)
    config = AutoConfig.from_pretrained(model)
    without = [not turns(config, layer_idx) for layer_idx in range(4)]
    assert 0 < sum(without) < 4
    for options in ((), ("--cross-layer", "1")):
        document = fuse(model, tmp_path / f"out{len(options)}", *LATENT, *options)
        layers = plan_of(Path(document["output"]))["layers"]
        assert [layer.get("still_planes") == 4 for layer in layers] == without
        tokens = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))
        assert_decoding_equals_forward(headfuse.load(document["output"]), tokens, torch.ones_like(tokens), [20, 20])
