"""Second moments of keys and values."""

from __future__ import annotations

import pytest
import torch

from headfuse.fusion.moments import value_moments
from headfuse.models.capture import AttentionCapture
from headfuse.plan import HeadLayout


@pytest.mark.parametrize("length", [8, 40])
def test_value_moments_are_those_of_averaged_values(length: int) -> None:
    """Whichever sum is the cheaper one: more channels than tokens, or fewer."""
    n, queries, d = 2, 4, 8
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    value, output = draw(3, n, length, d), draw(6, queries, d)
    capture = AttentionCapture(
        draw(3, queries, length, d), draw(3, n, length, d), value, draw(3, length, queries, d), None, 0.3
    )
    heads = HeadLayout(
        model_type="llama", num_hidden_layers=1, hidden_size=6, num_attention_heads=queries, num_key_value_heads=n,
        head_dim=d,
    )  # fmt: skip
    attention = capture.probabilities(capture.key).double()
    averaged = torch.einsum("bhts,bnsd->bhtnd", attention, value.double()).flatten(0, 2)
    expected = torch.einsum("rnc,rme->ncme", averaged, averaged) / len(averaged)
    torch.testing.assert_close(value_moments([capture], output, heads, None).covariance, expected, rtol=1e-5, atol=1e-7)
