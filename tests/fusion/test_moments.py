"""Second moments of keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headfuse.fusion.moments import key_moments, value_moments
from headfuse.models.capture import AttentionCapture
from headfuse.plan import HeadLayout

N, QUERIES, D = 2, 4, 8
HEADS = HeadLayout(
    model_type="llama", num_hidden_layers=1, hidden_size=6, num_attention_heads=QUERIES, num_key_value_heads=N,
    head_dim=D,
)  # fmt: skip


@pytest.mark.parametrize("seen", [{}, {"softcap": 5.0}, {"sinks": torch.zeros(QUERIES)}])
@pytest.mark.parametrize("rotary_dim", [D, D // 2, 0])
def test_a_key_added_to_all_of_a_window_counts_only_where_attention_sees_it(
    seen: dict[str, Any], rotary_dim: int
) -> None:
    """A softmax does not see it; a cap of the scores and a sink beside them do. So of channels that are not rotated."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key, common = draw(3, N, 20, D), 3 * draw(3, N, 1, D)  # another one in every window
    plain = AttentionCapture(draw(3, QUERIES, 20, D), key, key, draw(3, 20, QUERIES, D), None, 0.3, **seen)
    shifted = replace(plain, key=key + common)
    same = torch.allclose(plain.probabilities(plain.key), shifted.probabilities(shifted.key))
    assert same == (not seen)
    heads = HEADS.model_copy(update={"rotary_dim": rotary_dim})
    before, after = key_moments([plain], heads), key_moments([shifted], heads)
    if rotary_dim:
        assert torch.allclose(before.gram, after.gram) == same
    if rotary_dim < D:
        assert before.tail is not None
        assert after.tail is not None
        assert torch.allclose(before.tail.covariance, after.tail.covariance) == same


@pytest.mark.parametrize("length", [8, 40])
def test_value_moments_are_those_of_averaged_values(length: int) -> None:
    """Whichever sum is the cheaper one: more channels than tokens, or fewer."""
    n, queries, d = N, QUERIES, D
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    value, output = draw(3, n, length, d), draw(6, queries, d)
    capture = AttentionCapture(
        draw(3, queries, length, d), draw(3, n, length, d), value, draw(3, length, queries, d), None, 0.3
    )
    attention = capture.probabilities(capture.key).double()
    averaged = torch.einsum("bhts,bnsd->bhtnd", attention, value.double()).flatten(0, 2)
    expected = torch.einsum("rnc,rme->ncme", averaged, averaged) / len(averaged)
    torch.testing.assert_close(value_moments([capture], output, HEADS, None).covariance, expected, rtol=1e-5, atol=1e-7)
