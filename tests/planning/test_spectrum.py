"""`analyze --spectrum`: projections beside random matrices, ranks of the cache, and how well they predict costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headfuse.planning.spectrum import in_edges, marchenko_pastur_median, product_rank, rank_correlation
from tests.support.commands import run
from tests.support.tiny_models import tiny_model


def analyzed(model: Path, *args: object) -> dict[str, Any]:
    text = ("--data", model.parent / "text.txt", "--samples", 8, "--sequence-length", 32, "--preset", "fast")
    layout = () if "--layout" in args else ("--layout", "decoupled")
    document: dict[str, Any] = json.loads(run("analyze", model, *text, "--json", *layout, *args).splitlines()[-1])
    return document


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(200, 300), (300, 300), (300, 100)])
def test_a_random_matrix_ends_at_the_edge_and_planted_directions_lie_above_it(shape: tuple[int, int]) -> None:
    noise = 0.3 * random(*shape)
    assert in_edges(noise)[0] == pytest.approx(1, abs=0.04)
    planted = noise + 30 * torch.linalg.qr(random(shape[0], 3)).Q @ torch.linalg.qr(random(shape[1], 3)).Q.T
    assert (in_edges(planted) > 1.04).sum() == 3


def test_the_median_of_the_marchenko_pastur_law() -> None:
    assert marchenko_pastur_median(1.0) == pytest.approx(0.6528, abs=1e-3)  # Gavish and Donoho: (4/sqrt(3)/2.858)^2
    assert marchenko_pastur_median(1e-4) == pytest.approx(1, abs=1e-2)


def test_a_matrix_without_noise_has_its_rank_and_a_zero_matrix_none() -> None:
    assert (in_edges(random(50, 2) @ random(2, 60)) > 1).sum() == 2
    assert in_edges(torch.zeros(4, 6, dtype=torch.float64)).tolist() == [0.0] * 4


def test_the_product_of_random_projections_has_no_rank_and_a_planted_one_its_own() -> None:
    query, key = random(4, 32, 128), random(2, 32, 128).roll(1, 0)
    assert product_rank(query, key) == 0
    query[:2, 0] += 30  # the two heads that read the first key head
    key[0, 0] += 30
    assert product_rank(query, key) == 0.5


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 40], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(1)
    assert rank_correlation([4, 3, 2, 1], [1, 2, 3, 40]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)  # scipy.stats.spearmanr
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None


@pytest.mark.parametrize(("family", "args"), [("llama", ()), ("gpt2", ("--layout", "latent")), ("glm", ())])
def test_every_layer_of_a_family_has_its_figures(tmp_path: Path, family: str, args: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    found = analyzed(tiny_model(tmp_path / "model", family), "--spectrum", "-o", out, *args)["spectrum"]
    assert len(found["layers"]) == 2
    for layer in found["layers"]:
        for side in layer.values():
            assert side["rank_above_edge"] <= len(side["singular_values"]) == 32
            assert sum(side["energy"]) == pytest.approx(1)
            assert 1 <= side["effective_rank"] <= len(side["energy"])
            assert 1 <= side["channels_99"] <= 32
    assert found["correlation"]["key"]["effective_rank"] is None  # two layers have no order to speak of
    assert (out / "spectrum.png").exists()


def test_equal_value_heads_have_the_rank_of_one(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", layers=4)
    changed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for layer in changed.model.layers:
        values = layer.self_attn.v_proj.weight.data
        values.copy_(values[:8].repeat(4, 1))
    changed.save_pretrained(model)
    found = analyzed(model, "--spectrum", "--layout", "latent")["spectrum"]
    assert all(layer["value"]["channels_99"] <= 8 < layer["key"]["channels_99"] for layer in found["layers"])
    assert -1 <= found["correlation"]["key"]["effective_rank"] <= 1


def test_a_channel_that_is_much_larger_than_the_others_is_an_outlier(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    changed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = analyzed(model, "--spectrum")["spectrum"]["layers"]
    changed.model.layers[1].self_attn.v_proj.weight.data[3] *= 50
    changed.save_pretrained(model)
    after = analyzed(model, "--spectrum")["spectrum"]["layers"]
    assert [layer["value"]["outlier_channels"] for layer in before] == [0, 0]
    assert [layer["value"]["outlier_channels"] for layer in after] == [0, 1]


def test_a_layout_without_a_choice_measures_costs_for_it(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", layers=4)
    plain, found = (analyzed(model, "--layout", "gqa", *option) for option in ((), ("--spectrum",)))
    assert plain["spectrum"] is None
    assert found["spectrum"]["correlation"]["value"]["effective_rank"] is not None
    assert [layer["key"]["groups"] for layer in plain["layers"]] == [
        layer["key"]["groups"] for layer in found["layers"]
    ]


def test_the_table_says_how_the_figures_rank_the_layers(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", layers=4)
    output = run("analyze", model, "--spectrum", "--data", tmp_path / "text.txt", "--samples", 8,
                 "--sequence-length", 32, "--preset", "fast")  # fmt: skip
    assert "Spectra of keys" in output
    assert "cost" in output
