"""What a folder's model computes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import headfuse
from tests.support.tiny_models import VOCABULARY

TOKENS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))


def logits(folder: Path) -> torch.Tensor:
    """Logits `[2, 20, vocabulary]` on TOKENS, which are random and fixed."""
    with torch.no_grad():
        result: torch.Tensor = headfuse.load(folder, device="cpu")(TOKENS).logits
    return result


def in_transformers(folder: Path) -> torch.Tensor:
    """The same of the model that transformers makes of the folder."""
    with torch.no_grad():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    return result


def assert_decoding_equals_forward(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor, lengths: Sequence[int]
) -> None:
    """Decode left-padded `tokens [rows, width]`, four at once, then one by one: every row has its logits alone."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, steps = None, list[torch.Tensor]()
    with torch.no_grad():
        for start, end in itertools.pairwise([0, 4, *range(5, tokens.shape[1] + 1)]):
            step = model(
                tokens[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = step.past_key_values
            steps.append(step.logits)
        decoded = torch.cat(steps, dim=1)
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, -length:], use_cache=False).logits[0]
            torch.testing.assert_close(decoded[row, -length:], alone, rtol=1e-4, atol=1e-4)
