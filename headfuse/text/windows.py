"""Token windows."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from headfuse.errors import DataError
from headfuse.text.bos import start_token
from headfuse.text.records import Continued, Document

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TOKENISED_CHARACTERS = 2**21
"""Longer documents are tokenised in pieces."""


def cut(text: str, limit: int) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters, after a line end or a space where there is one."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or text.rfind(" ", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def with_start(windows: torch.Tensor, start: int | None) -> torch.Tensor:
    """Windows `[n, T]` with the start token before each, `[n, T + 1]`; unchanged without one."""
    from torch.nn.functional import pad

    return windows if start is None else pad(windows, (1, 0), value=start)


def iter_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> Iterator[torch.Tensor]:
    """Pack documents, joined by EOS, into windows `[sequence_length]`, in order.

    An incomplete last window is dropped. Each window begins with BOS if `start_token` gives one; no other special token
    is added. A single document needs no EOS.
    """
    import torch

    start, rest = start_token(tokenizer), list[int]()
    room = sequence_length - (start is not None)
    for ids in _token_lists(documents, tokenizer):
        rest += ids
        full = len(rest) // room * room
        yield from with_start(torch.tensor(rest[:full], dtype=torch.long).view(-1, room), start)
        del rest[:full]


def token_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_windows: int | None = None,
    *,
    required: int = 1,
    where: str | None = None,
) -> torch.Tensor:
    """The first windows of `iter_windows` as one tensor `[windows, sequence_length]`; reads no further than it must.

    Args:
        documents: the text.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens in a window.
        num_windows: how many windows; None takes all.
        required: with fewer windows than this it is an error.
        where: how the error names the data.

    Raises:
        DataError: for too little text, naming how many tokens there are and how many it takes.
    """
    tokens, start = _token_lists(documents, tokenizer), start_token(tokenizer)
    return _first_windows(tokens, start, sequence_length, num_windows, required, where)


def _first_windows(
    tokens: Iterable[list[int]],
    start: int | None,
    sequence_length: int,
    num_windows: int | None,
    required: int,
    where: str | None,
) -> torch.Tensor:
    """Token ids in a row, cut into windows that begin with the start token, if there is one."""
    import torch

    ids, room = list[int](), sequence_length - (start is not None)
    wanted = None if num_windows is None else num_windows * room
    for more in tokens:
        ids += more
        if wanted is not None and len(ids) >= wanted:
            break
    found = len(ids) // room if num_windows is None else min(len(ids) // room, num_windows)
    if found < required:
        raise DataError(
            f"holds {len(ids):,} tokens; {required * room:,} are needed"
            f" for {required} window{'s' * (required > 1)} of {sequence_length} tokens",
            where=where,
            fix="give more text, or a smaller --sequence-length",
        )
    return with_start(torch.tensor(ids[: found * room], dtype=torch.long).view(found, room), start)


def varied_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_windows: int,
    seed: int,
    *,
    required: int = 1,
    where: str | None = None,
) -> torch.Tensor:
    """Windows like those of `token_windows`, but from as many documents as possible: long ones would fill many windows.

    Each document gives one piece of at most one window, from a place drawn by the seed. If that is not enough, further
    pieces of the documents follow. Every piece ends in EOS. What is fitted to varied text carries over to other text
    (docs/experiments.md). The other arguments, the result `[windows, sequence_length]` and the errors are those of
    `token_windows`.
    """
    start = start_token(tokenizer)
    tokens = _pieces(documents, tokenizer, sequence_length - (start is not None), random.Random(seed))
    return _first_windows(tokens, start, sequence_length, num_windows, required, where)


def _pieces(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, draw: random.Random
) -> Iterator[list[int]]:
    """Token ids with EOS at their end, at most `length` together: a piece of every document, then the other pieces."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rests: list[array[int]] = []
    size = length - len(end)
    for ids in _token_lists(documents, tokenizer):
        if ids and ids != end:
            start = draw.randrange(max(1, len(ids) - size + 1))
            yield ids[start : start + size] + end
            for rest in ids[:start], ids[start + size :]:  # arrays: a token takes 4 bytes, in lists some 36
                rests += [array("i", rest[first : first + size]) for first in range(0, len(rest), size)]
    draw.shuffle(rests)
    yield from ([*rest, *end] for rest in rests)


def labelled_tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """The first `limit` tokens of documents joined by EOS, without BOS, and where each comes from.

    Returns:
        Token ids `[tokens]`, the index of each token's `Document.source` `[tokens]`, and these sources.
    """
    import torch

    ids, places, names = list[int](), list[int](), dict[str, int]()
    for more, document in _with_documents(documents, tokenizer):
        source = document.source if isinstance(document, Document) else ""
        ids += more
        places += [names.setdefault(source, len(names))] * len(more)
        if len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.long), torch.tensor(places[:limit], dtype=torch.long), list(names)


def _token_lists(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids, document by document, EOS between two; a long one is tokenised in pieces cut at line ends."""
    return (ids for ids, _ in _with_documents(documents, tokenizer))


def _with_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], str]]:
    """Token ids as `_token_lists` gives them, each with its document; an EOS is of the document that it ends."""
    before: str | None = None
    for document in documents:
        if before is not None and not isinstance(document, Continued):
            if tokenizer.eos_token_id is None:
                fix = "give one .txt file, or set eos_token in tokenizer_config.json"
                where = tokenizer.name_or_path
                raise DataError("the tokenizer has no EOS token to join documents with", where=where, fix=fix)
            yield [tokenizer.eos_token_id], before
        for piece in cut(document, TOKENISED_CHARACTERS):
            yield tokenizer(piece, add_special_tokens=False, verbose=False).input_ids, document
        before = document
