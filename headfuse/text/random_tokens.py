"""Windows of random tokens: they show the heads tokens that the calibration text lacks.

Text of one language holds a small part of a multilingual vocabulary, and what is fitted to it alone loses other
languages (docs/experiments/random-tokens.md).
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, unembedded: Container[int] = ()) -> torch.Tensor:
    """Ids `[v]` of the tokens that text is made of: the vocabulary without special tokens and `unembedded` ones."""
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = {index for index in tokenizer.get_vocab().values() if index not in special and index not in unembedded}
    return torch.tensor(sorted(found), dtype=torch.long)


def random_windows(count: int, length: int, tokens: torch.Tensor, bos: int | None, seed: int) -> torch.Tensor:
    """Draw `count` windows of random tokens.

    Args:
        count: how many there are.
        length: tokens of each.
        tokens: ids `[v]`, each drawn with the same chance.
        bos: the BOS token, if windows begin with it.
        seed: of the drawing.

    Returns:
        The windows `[count, length]`.
    """
    drawn = tokens[torch.randint(len(tokens), (count, length), generator=torch.Generator().manual_seed(seed))]
    if bos is not None:
        drawn[:, 0] = bos
    return drawn
