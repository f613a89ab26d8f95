"""Which of two plans loses less: measured on text that neither was made from, and by more than chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import headfuse
from headfuse.config.fuse import CalibrationConfig
from headfuse.fusion.moments import key_moments
from headfuse.fusion.wide import key_basis
from headfuse.models.attention import AttentionWeights
from headfuse.models.logits import kl_divergence
from headfuse.plan import FusionPlan, LayerPlan
from headfuse.planning import planner
from headfuse.planning.comparison import choice, loses_less, plan_losses
from headfuse.text.calibration import START_WEIGHT, CalibrationText
from tests.planning.tiny_sources import WINDOWS, opened
from tests.support.commands import fuse
from tests.support.plans import plan_of
from tests.support.planted_heads import edit_weights, plant
from tests.support.tiny_models import FAMILY_OPTIONS, tiny_model

LATENT = ("--layout", "latent", "--preset", "fast", "--budget", "1/2")


@pytest.mark.parametrize(
    ("allocated", "equal", "won"),
    [
        ([0.5, 0.7, 0.6, 0.4], [0.6, 0.8, 0.7, 0.5], True),  # a tenth less in every window, however different they are
        ([0.6, 0.8, 0.7, 0.5], [0.5, 0.7, 0.6, 0.4], False),
        ([0.5, 0.7, 0.6, 0.4], [0.5, 0.7, 0.6, 0.4], False),
        ([0.5, 0.7, 0.6, 0.4], [0.7, 0.6, 0.7, 0.4], False),  # less in the mean, by no more than chance
        ([0.5, 0.7, 0.6, 0.4], [0.6, 0.7, 0.7, 0.5], True),
        ([0.1, 0.6, 0.1, 0.1], [0.13, 0.9, 0.14, 0.15], True),  # a third less in every window: one loses far more
        ([0.3, 0.6, 0.3, 0.3], [0.29, 0.9, 0.31, 0.29], False),  # the mean is the gain of one window
        ([0.0, -1e-12, 0.0, 0.0], [0.0, 0.0, 1e-12, -1e-12], False),
    ],
)
def test_an_allocated_plan_has_to_prove_itself(allocated: list[float], equal: list[float], won: bool) -> None:
    assert loses_less(torch.tensor(allocated), torch.tensor(equal)) is won


@pytest.mark.parametrize(
    ("first", "second", "chosen"),
    [
        ([0.5, 0.7, 0.6, 0.4], [0.4, 0.6, 0.5, 0.3], 1),
        ([0.4, 0.6, 0.5, 0.3], [0.5, 0.7, 0.6, 0.4], 0),
        ([0.7, 0.6, 0.7, 0.4], [0.5, 0.7, 0.6, 0.4], 1),  # the first one is no better than equal widths
        ([0.7, 0.6, 0.7, 0.4], [0.8, 0.8, 0.7, 0.5], 2),
        ([0.1, 0.6, 0.6, 0.6], [0.5, 0.7, 0.6, 0.4], 2),  # the least by one window alone is in doubt
    ],
)
def test_the_least_loss_is_taken_if_it_is_beyond_doubt(first: list[float], second: list[float], chosen: int) -> None:
    assert choice(torch.tensor([first, second, [0.6, 0.8, 0.7, 0.5]])) == chosen


def wide_plan(folder: Path, *widths: int | None) -> FusionPlan:
    """A plan of layout latent: the width of both sides of each layer, None for an untouched one."""
    source, heads = opened(folder)[0], ((0, 1, 2, 3),)
    alone = tuple((head,) for head in heads[0])
    layers = [
        LayerPlan(layer_idx=i, key_groups=alone, value_groups=alone)
        if width is None
        else LayerPlan(
            layer_idx=i, key_groups=heads, value_groups=heads, key_widths=(width,), value_widths=(width,),
            rotary_slots=(tuple(range(4)) * (width // 8),),
        )
        for i, width in enumerate(widths)
    ]  # fmt: skip
    return FusionPlan(
        headfuse_version="0", source=source.identity(), heads=source.heads, layout="latent", method="subspace",
        allocator="uniform", budget="0.5", layers=tuple(layers),
    )  # fmt: skip


def test_what_a_plan_loses(tmp_path: Path) -> None:
    """An untouched model loses nothing, a full width nothing but rounding, and a narrower one more."""
    model = tiny_model(tmp_path / "model", layers=2)
    _, streamed = opened(model)
    text = CalibrationText.split(WINDOWS.repeat(8, 1), 0)  # enough rows for a refit that is no noise
    plans = [wide_plan(model, *widths) for widths in ((None, None), (32, 32), (16, None), (8, None), (8, 8))]
    slow = [()] * 2
    untouched, full, half, quarter, both = plan_losses(plans, streamed, text, WINDOWS, slow, lambda *_: None)
    assert untouched.shape == (len(WINDOWS),)
    assert untouched.abs().max() < 1e-7
    assert full.abs().max() < 1e-5
    assert 1e-5 < half.mean() < quarter.mean() < both.mean()
    alone = plan_losses(plans[-1:], streamed, text, WINDOWS, slow, lambda *_: None)
    torch.testing.assert_close(alone[0], both)


@pytest.mark.parametrize(
    ("family", "side"),
    [("llama", "value"), *((family, "key") for family in ("llama", "qwen3", "olmo2", "cohere", "hunyuan_v1_dense"))],
)
def test_the_loss_of_a_plan_is_that_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, side: str
) -> None:
    """One side is narrow, so the layer is fitted under the same attention as in the conversion; norms of all kinds."""
    monkeypatch.setitem(FAMILY_OPTIONS, "cohere", {"use_qk_norm": True, "logit_scale": 4.0})
    model = tiny_model(tmp_path / "model", family, layers=1, query_heads=8)

    def enlarge(weights: AttentionWeights, *_: Any) -> None:  # scores of random weights hardly matter
        (weights.key if weights.key_norm is None else weights.key_norm).mul_(6)
        weights.value.mul_(6)

    edit_weights(model, enlarge)
    source, streamed = opened(model)
    calibration = CalibrationConfig(data=str(tmp_path / "text.txt"), samples=4, sequence_length=32)
    text = source.calibration_text(calibration, 0, False)
    states = [streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)]
    best = [key_basis(key_moments(layer.captures, source.heads)).slots(8) for layer in streamed.walk(states)]
    plan = wide_plan(model, 32)
    slots = {"rotary_slots": tuple(best)} if side == "key" else {}
    narrow = plan.layers[0].model_copy(update={f"{side}_widths": (8,), **slots})
    plan = plan.model_copy(update={"layers": (narrow,)})
    (tmp_path / "plan.json").write_text(plan.to_json())
    fuse(model, tmp_path / "out", "--plan", tmp_path / "plan.json", "--samples", 4, "--preset", "fast")
    found = plan_losses([plan], streamed, text, WINDOWS, [()], lambda *_: None)[0]
    with torch.no_grad():
        before, after = (headfuse.load(folder)(WINDOWS).logits.double() for folder in (model, tmp_path / "out"))
    wanted = [kl_divergence(after[i], before[i]).item() / WINDOWS.shape[1] for i in range(len(WINDOWS))]
    assert min(wanted) > 1e-6
    assert found.tolist() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("won", [True, False])
def test_the_plan_that_loses_less_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, won: bool) -> None:
    model = tiny_model(tmp_path / "model")
    seen: dict[str, Any] = {}

    def decided(plans: list[FusionPlan], streamed: Any, text: Any, windows: Any, *_: Any) -> Any:
        seen.update(fitted=text.statistics, windows=windows, plans=plans)
        return plans[0] if won else plans[-1]

    monkeypatch.setattr(planner, "best_plan", decided)
    fuse(model, tmp_path / "out", *LATENT)
    plan = plan_of(tmp_path / "out")
    widths = {tuple(layer["key_widths"]) + tuple(layer["value_widths"]) for layer in plan["layers"]}
    assert plan["allocator"] == ("sensitivity" if won else "uniform")
    assert (widths == {(16, 16)}) is not won
    assert [each.allocator for each in seen["plans"]] == ["sensitivity", "shrinkage", "uniform"]
    assert seen["plans"][0].layers != seen["plans"][2].layers
    fitted, windows = ({tuple(row[:16].tolist()) for row in seen[name]} for name in ("fitted", "windows"))
    assert len(windows) > 1
    assert not fitted & windows  # neither plan was made from this text


@pytest.mark.parametrize("clear", ["nothing lost", "allocator", "layout"])
def test_what_is_not_in_doubt_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clear: str) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("plans were compared")

    monkeypatch.setattr(planner, "best_plan", measured)
    model, options = tiny_model(tmp_path / "model"), list(LATENT)
    if clear == "nothing lost":
        plant(model, [[0, 1, 2, 3]], [[0, 1, 2, 3]])
    elif clear == "allocator":
        options += ["--allocator", "sensitivity"]
    else:
        options[1] = "decoupled"
    fuse(model, tmp_path / "out", *options)
    assert plan_of(tmp_path / "out")["allocator"] == "sensitivity"
