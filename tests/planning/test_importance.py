"""Scores of single heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import headfuse
from headfuse.checkpoint.plan_file import read_plan
from headfuse.planning import importance as importance_module
from headfuse.planning.importance import HEAD_IMPORTANCE, cost_table
from tests.planning.tiny_sources import WINDOWS, opened
from tests.support.commands import fuse
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("score", sorted(HEAD_IMPORTANCE))
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_head_that_nobody_reads_has_no_importance(
    tmp_path: Path, model_type: str, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance_module, "COALITIONS_PER_HEAD", 20)  # a random model's losses hardly differ
    model = tiny_model(tmp_path / "model", model_type, query_heads=8)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][:, 2 * 16 : 3 * 16] = 0  # both query heads of KV head 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    _, streamed = opened(model)
    importance = HEAD_IMPORTANCE[score](streamed, WINDOWS, 0)
    assert importance.shape == (2, 2, 4)
    others = importance[:, 1, [0, 1, 3]]
    assert importance[:, 1, 2].abs().max() < (1e-9 if score == "taylor" else 0.3 * others.abs().max())


def test_taylor_is_the_gradient_of_a_mask(tmp_path: Path) -> None:
    """Against finite differences of the loss in a factor on one head's values."""
    model = tiny_model(tmp_path / "model", "qwen2")
    _, streamed = opened(model)
    window = WINDOWS[:1]
    importance = HEAD_IMPORTANCE["taylor"](streamed, window, 0)
    changed, losses = headfuse.load(model).double(), []
    attention = changed.model.layers[0].self_attn.v_proj
    for factor in (1 - 1e-4, 1 + 1e-4):
        weight, bias = attention.weight.data.clone(), attention.bias.data.clone()
        attention.weight.data[8:16] *= factor
        attention.bias.data[8:16] *= factor
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(changed(window).logits[0, :-1], window[0, 1:]).item())
        attention.weight.data, attention.bias.data = weight, bias
    assert importance[1, 0, 1].item() == pytest.approx(abs(losses[1] - losses[0]) / 2e-4, rel=1e-2)


def test_a_cost_table_of_scores() -> None:
    scores = torch.tensor([[[0.5, 0.1, 0.2]], [[0.0, 3.0, -1.0]]])
    assert cost_table(scores).rows == [pytest.approx([0.3, 0.1, 0.0]), pytest.approx([0.0, 0.0, 0.0])]


@pytest.mark.parametrize("allocator", ["taylor", "shapley", "sensitivity"])
def test_scores_decide_the_budget(tmp_path: Path, allocator: str) -> None:
    model = tiny_model(tmp_path / "model")
    fuse(model, tmp_path / "out", "--budget", "0.5", "--allocator", allocator)
    plan = read_plan(tmp_path / "out" / "plan.json")
    assert plan.allocator == allocator
    assert plan.head_budget.total == 8
