"""The BOS token, as a tokenizer puts it before a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token, if the tokenizer puts it before every text by default, as in the model's training; else None."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("text", verbose=False).input_ids
    plain = tokenizer("text", add_special_tokens=False, verbose=False).input_ids
    return bos if bos is not None and ids[:1] == [bos] and plain[:1] != [bos] else None
