"""What an attention layer computed: both forms of it agree."""

from __future__ import annotations

import pytest
import torch

from headfuse.models.capture import AttentionCapture


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_both_forms_of_attention_agree(mask: str | None) -> None:
    """The fused one, and probabilities of all or of every third query, under each kind of mask."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 10, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 10, 8, generator=generator)
    near = torch.ones(10, 10, dtype=torch.bool).tril().triu(-6)[None, None]
    biased = (torch.arange(1.0, 5).view(1, 4, 1, 1) * torch.arange(10.0)).masked_fill(~near, float("-inf"))
    masks = {"boolean": near, "additive": biased}
    capture = AttentionCapture(query, key, value, torch.empty(2, 10, 4, 8), masks.get(mask or ""), 0.3)
    probabilities = capture.probabilities(key)
    scores = query @ key.repeat_interleave(2, dim=1).mT * 0.3
    if mask != "additive":
        allowed = near if mask else torch.ones(10, 10, dtype=torch.bool).tril()
        expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    else:
        expected = (scores + biased).softmax(-1)
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(capture.attend(key, value), expected @ value.repeat_interleave(2, dim=1))
    torch.testing.assert_close(capture.probabilities(key, 3), probabilities[:, :, ::3])
