"""A method added by docs/contributing/add_a_method.md: the page's own code under every law, and one real fuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import headfuse
from headfuse.config.fuse import FuseConfig
from headfuse.fusion import FUSION_METHODS, FusionMethod
from headfuse.fusion.losses import lost_key_energy
from headfuse.fusion.methods import mean
from headfuse.fusion.moments import KeyMoments
from headfuse.layouts import LAYOUTS
from tests.laws import test_exactness as exactness
from tests.laws.pages import code_of, entry_of
from tests.laws.tables import read_plan
from tests.support.model_outputs import logits
from tests.support.tiny_models import tiny_model

PAGE = "add_a_method.md"
KNOWN = "mean"
"""The command's options know no new name, so that for the laws the new method stands under one of theirs."""


@pytest.fixture
def energy(monkeypatch: pytest.MonkeyPatch) -> FusionMethod:
    """The method of the page in the table, under its own name and instead of a known one."""
    module = code_of(PAGE)
    method: FusionMethod = entry_of(PAGE, "energy", energy=module, FusionMethod=FusionMethod)
    monkeypatch.setitem(FUSION_METHODS, "energy", method)
    monkeypatch.setitem(FUSION_METHODS, KNOWN, method)
    return method


@pytest.mark.usefixtures("energy")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_full_budget_and_order_of_heads(tmp_path: Path, layout: str) -> None:
    exactness.test_full_budget_copies_bit_for_bit(tmp_path / "full", "qwen2", 8, KNOWN, layout)
    exactness.test_order_of_heads_does_not_matter(tmp_path / "order", KNOWN, layout)


@pytest.mark.usefixtures("energy")
def test_heads_that_stay_alone(tmp_path: Path) -> None:
    exactness.test_heads_that_stay_alone_are_copied_bit_for_bit(tmp_path, KNOWN)


def test_its_maps_lose_less_than_the_plain_mean(energy: FusionMethod) -> None:
    """It is the least-squares key among those that are read as they are."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(4, 3, 50, dtype=torch.complex128, generator=generator)  # [F, n, T]
    moments = KeyMoments(keys @ keys.mH, torch.rand(3, 4, dtype=torch.float64, generator=generator))
    groups, plain = ((0, 1, 2),), FusionMethod(mean.keys, mean.values)
    lost = [lost_key_energy(method.key_maps(groups, moments), groups, moments) for method in (energy, plain)]
    assert lost[0] < lost[1]


@pytest.mark.usefixtures("energy")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_is_fused_under_its_name(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family)
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 8, "sequence_length": 32}
    config = FuseConfig.model_validate({"budget": {"total": "1/2"}, "preset": "fast", "calibration": calibration})
    config = config.model_copy(update={"method": "energy"})
    result = headfuse.fuse(str(model), config=config, output=tmp_path / "out")
    assert read_plan(tmp_path / "out").method == result.plan.method == "energy"
    assert result.plan.kv_ratio == 0.5
    assert torch.isfinite(logits(tmp_path / "out")).all()
    assert not torch.allclose(logits(tmp_path / "out"), logits(model), atol=1e-3)
