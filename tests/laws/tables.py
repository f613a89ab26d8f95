"""The tables that the laws iterate over."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from headfuse.errors import UnsupportedModelError
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS
from headfuse.plan import FusionPlan
from headfuse.planning.allocators import ALLOCATORS

FAMILIES = ("llama", "mistral", "qwen2")
"""The other families obey the same laws in tests/contracts/test_families.py."""
families = pytest.mark.parametrize("model_type", FAMILIES)
closed_form = [name for name, method in FUSION_METHODS.items() if not method.trained]  # the others: test_dha.py
methods = pytest.mark.parametrize("method", sorted(closed_form))
layouts = pytest.mark.parametrize("layout", sorted(LAYOUTS))
allocators = pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
query_heads = pytest.mark.parametrize("query_heads", [4, 8], ids=["mha", "gqa"])
lossless = [name for name, method in FUSION_METHODS.items() if method.lossless]


def skip_misfit(layout: str, model: Path, method: str = "subspace") -> None:
    """Skip where a layout refuses the model or the method."""
    if LAYOUTS[layout].wide and not FUSION_METHODS[method].wide:
        pytest.skip(f"{method} makes no wide heads: tests/layouts/test_latent.py")
    check = LAYOUTS[layout].check
    try:
        if check is not None:
            check(AutoConfig.from_pretrained(model))
    except UnsupportedModelError as refusal:
        pytest.skip(str(refusal))


def read_plan(folder: Path) -> FusionPlan:
    return FusionPlan.from_json((folder / "plan.json").read_text())
