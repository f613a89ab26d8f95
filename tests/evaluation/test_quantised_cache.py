"""eval --cache-dtype: what a model of every layout predicts from a KV cache of few bits, and how large it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headfuse
from headfuse import choices
from headfuse.errors import ConfigError
from headfuse.evaluation.quantised_cache import GROUP, QuantisedCache, QuantisedCaches, rounded, stored_bytes
from headfuse.layouts import LAYOUTS
from headfuse.layouts.folder import kv_bytes_per_token
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

INTEGERS: dict[choices.CacheDtype, int] = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
NAMES: tuple[choices.CacheDtype, ...] = ("fp8", *INTEGERS)


def states(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_equal_steps_between_smallest_and_largest(dtype: choices.CacheDtype) -> None:
    given = 5 + states(2, 3, 7, 32)
    found = rounded(given, dtype)
    step = (given.amax(-1) - given.amin(-1)) / (2 ** INTEGERS[dtype] - 1)
    assert ((found - given).abs().amax(-1) <= 0.5 * step + 0.01).all()  # float16 has 0.004 between 8 and 16
    assert all(len(row.unique()) <= 2 ** INTEGERS[dtype] for row in found.flatten(0, 2))
    assert torch.equal(found[0, 1, 2], rounded(given[0, 1, 2], dtype))  # a token and head by itself


def test_fp8_keeps_three_bits_after_the_first() -> None:
    given = states(4, 64) * torch.tensor([1e-3, 1.0, 30.0, 1e5])[:, None]
    found = rounded(given, "fp8")
    large = given.abs() > given.abs().amax(-1, keepdim=True) / 2**14  # below, e4m3 has steps of one size
    assert ((found - given).abs() <= given.abs() * 2**-4 * 1.01)[large].all()


@pytest.mark.parametrize("dtype", NAMES)
def test_what_has_no_spread_and_what_is_huge(dtype: choices.CacheDtype) -> None:
    for value in (0.0, 2.0, -3.5):
        assert torch.allclose(rounded(torch.full((1, 16), value), dtype), torch.full((1, 16), value), rtol=1e-3)
    assert torch.isfinite(rounded(torch.tensor([[1e30, -1e30, 0.0, 1.0]]), dtype)).all()
    assert rounded(states(2, 8).bfloat16(), dtype).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", NAMES)
def test_a_wide_head_is_rounded_like_heads_side_by_side(dtype: choices.CacheDtype) -> None:
    heads = states(5, 3, GROUP) * torch.tensor([1.0, 20.0, 0.1])[:, None]
    assert torch.equal(rounded(heads.flatten(1), dtype), rounded(heads, dtype).flatten(1))
    one, three = stored_bytes(GROUP, dtype), stored_bytes(3 * GROUP, dtype)
    assert (three.numbers, three.scales) == (3 * one.numbers, 3 * one.scales)


def test_bytes_are_of_numbers_and_of_scales() -> None:
    found = {dtype: (stored_bytes(64, dtype).numbers, stored_bytes(64, dtype).scales) for dtype in NAMES}
    assert found == {"fp8": (64, 2), "int8": (64, 4), "int4": (32, 4), "int3": (24, 4), "int2": (16, 4)}
    assert (stored_bytes(65, "int4").numbers, stored_bytes(65, "int4").scales) == (33, 8)


@pytest.fixture(scope="module", params=["source", *LAYOUTS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every layout."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(folder / "model", query_heads=8, kv_heads=8)
    if request.param != "source":
        fuse(model, folder / "out", "--budget", "0.5", "--layout", request.param, "--preset", "fast")
    return folder / ("model" if request.param == "source" else "out")


def evaluate(folder: Path, *args: object, code: int = 0) -> dict[str, Any]:
    data = ("--data", folder.parent / "text.txt", "--samples", 4, "--sequence-length", 32)
    document: dict[str, Any] = json.loads(run("eval", folder, *data, *args, "--json", code=code).splitlines()[-1])
    return document


def test_bytes_and_loss_of_every_layout(folder: Path) -> None:
    plain = evaluate(folder)
    config = headfuse.load(folder).config
    gaps = {}
    for dtype in ("fp8", "int8", "int2"):
        document = evaluate(folder, "--cache-dtype", dtype, "--baseline", folder)
        model, baseline = document["model"], document["baseline"]
        assert (model["kv_dtype"], document["cache_dtype"]) == (dtype, dtype)
        assert dtype in document["cache_protocol"]
        numbers = model["kv_bytes_per_token"] - model["kv_scale_bytes_per_token"]
        assert numbers == kv_bytes_per_token(config, 8) // 64 * INTEGERS.get(dtype, 8)
        assert model["kv_scale_bytes_per_token"] > 0
        assert (baseline["nll"], baseline["kv_bytes_per_token"]) == (
            plain["model"]["nll"], plain["model"]["kv_bytes_per_token"],
        )  # fmt: skip
        assert document["kv_ratio"] == model["kv_bytes_per_token"] / baseline["kv_bytes_per_token"]
        gaps[dtype] = document["comparison"]["nll_gap"]
    assert all(gap != 0 for gap in gaps.values())
    assert abs(gaps["int8"]) < 0.01
    assert abs(gaps["int8"]) < abs(gaps["int2"])
    assert (plain["cache_dtype"], plain["model"]["kv_scale_bytes_per_token"]) == (None, 0)


def logits_one_by_one(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    output = model(tokens[:, :3], use_cache=True)
    logits = [output.logits]
    for index in range(3, tokens.shape[1]):
        output = model(tokens[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def test_one_pass_reads_what_decoding_reads(folder: Path) -> None:
    """So the NLL of a pass over a window is that of a model that decodes with such a cache."""
    model = headfuse.load(folder).double()  # in float32, the order of a sum decides how a number half-way is rounded
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(tokens).logits
        caches = QuantisedCaches(model, "int3")
        whole, steps = model(tokens).logits, logits_one_by_one(model, tokens)
        assert torch.allclose(whole, steps, atol=1e-4)
        assert not torch.allclose(whole, exact, atol=1e-2)
        assert caches.last is not None
        assert caches.last.get_seq_length() == 20
        generated = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert isinstance(caches.last, QuantisedCache)
    assert caches.last.get_seq_length() == generated.shape[1] - 1


@pytest.mark.parametrize("family", ["mistral", "gptj", "bloom", "qwen3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Sliding windows, ALiBi, norms of heads, and caches under other names."""
    model = headfuse.load(tiny_model(tmp_path / "model", family))
    tokens = torch.randint(1, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    caches = QuantisedCaches(model, "int4")
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, logits_one_by_one(model, tokens), atol=1e-4)
    text = model.config
    assert caches.bytes_per_token().numbers == kv_bytes_per_token(text, 2) // 4


def test_bad_values_and_combinations(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    assert "int4" in run("eval", model, "--cache-dtype", "int5", code=2)
    document = evaluate(model, "--cache-dtype", "int4", "--baseline", model, "--speed", code=1)
    assert document["error"]["where"] == "--cache-dtype"
    with pytest.raises(ConfigError, match="int4"):
        headfuse.evaluate(model, cache_dtype="int5")
    (tmp_path / "eval.yaml").write_text("cache_dtype: int4\nsamples: 2\nsequence_length: 16\n")
    found = json.loads(
        run(
            "eval", model, "--config", tmp_path / "eval.yaml", "--data", tmp_path / "text.txt", "--json"
        ).splitlines()[-1]
    )  # fmt: skip
    assert found["model"]["kv_dtype"] == "int4"
