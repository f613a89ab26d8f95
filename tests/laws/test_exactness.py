"""Laws of exactness: what every method, allocator and layout keeps bit for bit or without loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headfuse.fusion import FUSION_METHODS
from headfuse.models.families import READ_MAPS, WRITE_MAPS
from headfuse.planning.allocators import ALLOCATORS
from headfuse.planning.importance import HEAD_IMPORTANCE
from tests.laws.tables import (
    FAMILIES,
    closed_form,
    families,
    layouts,
    lossless,
    methods,
    query_heads,
    read_plan,
    skip_misfit,
)
from tests.support.commands import fuse
from tests.support.model_outputs import logits
from tests.support.planted_heads import by_head, edit_heads, plant
from tests.support.tiny_models import tiny_model


# 1
@layouts
@pytest.mark.parametrize(
    ("model_type", "query_heads", "method"),
    [(family, count, "subspace") for family in FAMILIES for count in (4, 8)]
    + [("qwen2", 8, method) for method in sorted(closed_form) if method != "subspace"],
)
def test_full_budget_copies_bit_for_bit(
    tmp_path: Path, model_type: str, query_heads: int, method: str, layout: str
) -> None:
    model = tiny_model(tmp_path / "model", model_type, query_heads=query_heads)
    skip_misfit(layout, model, method)
    quick = ("--samples", 2, "--allocator", "uniform")
    fuse(model, tmp_path / "out", "--budget", 1, "--method", method, "--layout", layout, *quick)
    source, fused = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert source.keys() == {name for name in fused if not name.endswith(WRITE_MAPS + READ_MAPS)}
    assert all(torch.equal(source[name], fused[name]) for name in source)
    assert torch.equal(logits(model), logits(tmp_path / "out"))


@methods
def test_heads_that_stay_alone_are_copied_bit_for_bit(tmp_path: Path, method: str) -> None:
    model = tiny_model(tmp_path / "model", "qwen2")
    layers = [{"layer_idx": 0, "key_groups": [[0, 1, 2, 3]], "value_groups": [[0], [1, 2], [3]]}]
    layers += [{"layer_idx": 1, "key_groups": [[0], [1], [2], [3]], "value_groups": [[0], [1], [2], [3]]}]
    fuse(model, tmp_path / "first", "--budget", 1, "--method", method)
    plan = {**json.loads((tmp_path / "first/plan.json").read_text()), "layers": layers}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    document = fuse(model, tmp_path / "out", "--plan", tmp_path / "plan.json", "--preset", "fast")
    assert (document["key_heads"], document["value_heads"]) == ([1, 4], [3, 4])
    source, fused = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    changed = {name for name in source if not torch.equal(source[name], fused[name])}
    assert all(name.startswith("model.layers.0.self_attn.") for name in changed)
    for kind in ("weight", "bias"):
        name = f"model.layers.0.self_attn.v_proj.{kind}"
        assert torch.equal(fused[name][:8], source[name][:8])
        assert torch.equal(fused[name][16:], source[name][24:])


# 2
@pytest.mark.parametrize("allocator", sorted(ALLOCATORS.keys() - HEAD_IMPORTANCE.keys() - {"dha-greedy"}))
@layouts
@query_heads
@families
@pytest.mark.parametrize("method", lossless)
def test_planted_groups_are_found_and_lossless(
    tmp_path: Path, model_type: str, query_heads: int, method: str, layout: str, allocator: str
) -> None:
    model = tiny_model(tmp_path / "model", model_type, query_heads=query_heads)
    skip_misfit(layout, model)
    plant(model, [[0, 3], [1, 2]])
    document = fuse(
        model, tmp_path / "out", "--budget", "1/2", "--layout", layout, "--method", method, "--allocator", allocator
    )
    assert document["kv_ratio"] == 0.5
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", lossless)
@pytest.mark.parametrize(
    ("keys", "values"),
    [([[0, 1, 2, 3]], [[0, 2], [1], [3]]), ([[0, 3], [1], [2]], [[3, 2, 1, 0]]), ([[0, 2, 3], [1]], [[0, 1], [2, 3]])],
)
def test_planted_groups_of_unequal_sizes_are_lossless(
    tmp_path: Path, method: str, keys: list[list[int]], values: list[list[int]]
) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    plant(model, keys, values)
    document = fuse(model, tmp_path / "out", "--budget", "1/2", "--method", method)
    assert (document["key_heads"], document["value_heads"]) == ([len(keys)] * 2, [len(values)] * 2)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in lossless if FUSION_METHODS[name].slots is not None])
def test_unrelated_keys_of_half_the_frequencies_share_one_head(tmp_path: Path, method: str) -> None:
    """Two heads that leave half of the rotary planes empty fill the slots of one head, two slots a frequency."""
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)

    def change(attention: Any) -> None:
        for heads in by_head(attention.k_proj):
            heads[:2, [0, 2, 4, 6]] = 0  # planes 0 and 2 of heads 0 and 1; plane f is (f, f + 4)

    edit_heads(model, change)
    (tmp_path / "options.yaml").write_text(f"budget: {{key_heads: [3, 3], value_heads: [4, 4]}}\nmethod: {method}\n")
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml")
    assert [layer.key_groups[0] for layer in read_plan(tmp_path / "out").layers] == [(0, 1)] * 2
    assert json.loads((tmp_path / "out/config.json").read_text())["rotary_slots"][0][0] == [1, 1, 3, 3]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-5, atol=1e-5)


# 3
@layouts
@families
def test_mean_is_three_lines(tmp_path: Path, model_type: str, layout: str) -> None:
    model = tiny_model(tmp_path / "model", model_type, query_heads=8)
    skip_misfit(layout, model, "mean")
    options = ["--method", "mean", "--grouping", "neighbours", "--allocator", "uniform", "--layout", layout]
    fuse(model, tmp_path / "out", "--budget", "1/2", *options)
    source, fused = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name, tensor in source.items():
        if "k_proj" in name or "v_proj" in name:
            tensor = tensor.unflatten(0, (2, 2, 8)).double().mean(1).flatten(0, 1).float()
        torch.testing.assert_close(fused[name], tensor, rtol=1e-6, atol=1e-7)


# 4
@layouts
@pytest.mark.parametrize("method", [name for name in closed_form if not FUSION_METHODS[name].order_dependent])
def test_order_of_heads_does_not_matter(tmp_path: Path, method: str, layout: str) -> None:
    for name in ("plain", "permuted"):
        skip_misfit(layout, tiny_model(tmp_path / name, "qwen2", query_heads=8), method)
    order = [2, 0, 3, 1]
    query_order = [2 * head + i for head in order for i in range(2)]

    def permute(attention: Any) -> None:
        for projection, index in (
            (attention.q_proj, query_order),
            (attention.k_proj, order),
            (attention.v_proj, order),
        ):
            for heads in by_head(projection):
                heads.copy_(heads[index].clone())
        output = attention.o_proj.weight.data.unflatten(1, (8, -1))
        output.copy_(output[:, query_order].clone())

    edit_heads(tmp_path / "permuted", permute)
    torch.testing.assert_close(logits(tmp_path / "plain"), logits(tmp_path / "permuted"), rtol=1e-4, atol=1e-4)
    for name in ("plain", "permuted"):
        fuse(tmp_path / name, tmp_path / f"{name}-out", "-b", "1/2", "--method", method, "--layout", layout)
    torch.testing.assert_close(logits(tmp_path / "plain-out"), logits(tmp_path / "permuted-out"), rtol=1e-4, atol=1e-4)
