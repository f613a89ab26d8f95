"""Which combinations of the contract of families wait for CI: what other families show as well."""

from __future__ import annotations

import pytest

from headfuse.models.families import ARCHITECTURES

ALIKE = {
    "apertus", "arcee", "cohere2", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "flex_olmo", "glm", "glm4", "granitemoe",
    "granitemoeshared", "helium", "hunyuan_v1_moe", "hyperclovax", "jais2", "mellum", "ministral", "nemotron", "olmo3",
    "phimoe", "seed_oss", "solar_open", "vaultgemma",
}  # fmt: skip
"""Families whose keys are of a kind that another family has: by default their core is tested, in layout decoupled."""
CORE = (
    "test_planted_groups_are_lossless",
    "test_streamed_logits_are_the_models",
    "test_output_reloads_with_the_promised_cache",
    "test_cached_decoding_equals_the_full_pass",
    "test_full_budget_copies_bit_for_bit",
    "test_training_mode_drops_out_what_the_source_drops_out",
    "test_stored_weights_survive_the_round_trip",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is not of the core as `long`, which CI runs."""
    assert ARCHITECTURES.keys() >= ALIKE
    for item in items:
        given = getattr(item, "callspec", None)
        if item.path.name != "test_families.py" or given is None:
            continue
        case = given.params.get("fused") or given.params.get("untouched") or (given.params.get("family"), "decoupled")
        core = getattr(item, "originalname", "") in CORE and case[1] == "decoupled"
        if case[0] in ALIKE and not core:
            item.add_marker(pytest.mark.long)
