"""Token windows."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from headfuse.errors import DataError
from headfuse.text.windows import iter_windows, token_windows, varied_windows
from tests.text.corpus import SENTENCES, packed


@pytest.mark.parametrize("length", [2, 16, 100])
def test_packing_is_exact(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    ids = packed(SENTENCES, tokenizer)
    windows = token_windows(SENTENCES, tokenizer, length)
    assert windows.shape == (len(ids) // length, length)
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert torch.equal(torch.stack(list(iter_windows(SENTENCES, tokenizer, length))), windows)
    assert torch.equal(token_windows(SENTENCES, tokenizer, length, 3), windows[:3])


def test_long_documents_are_tokenised_in_pieces_to_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headfuse.text.windows.TOKENISED_CHARACTERS", 100)
    document = "\n".join(SENTENCES)
    ids = tokenizer.encode(document, add_special_tokens=False)
    assert token_windows([document], tokenizer, 1).flatten().tolist() == ids


def test_windows_are_read_lazily(tokenizer: PreTrainedTokenizerFast) -> None:
    def documents() -> Iterator[str]:
        yield from SENTENCES[:4]
        pytest.fail("read further than needed")

    assert token_windows(documents(), tokenizer, 8, 2).shape == (2, 8)
    assert len(list(islice(iter_windows(documents(), tokenizer, 8), 2))) == 2


def test_too_little_text_names_both_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    count = len(packed(SENTENCES[:2], tokenizer))
    message = rf"a.txt: holds {count} tokens; 1,536 are needed for 3 windows of 512 tokens"
    with pytest.raises(DataError, match=message):
        token_windows(SENTENCES[:2], tokenizer, 512, 5, required=3, where="a.txt")
    assert token_windows(SENTENCES[:2], tokenizer, 512, required=0).shape == (0, 512)


def spaced(ids: list[int]) -> str:
    return "".join(f" {token} " for token in ids).replace("  ", " ")


def test_varied_windows_take_a_piece_of_every_document_first(tokenizer: PreTrainedTokenizerFast) -> None:
    """Then the others, each token once; another seed draws other places."""
    documents, length = [f"{SENTENCES[i]} " * (1, 9, 30)[i % 3] for i in range(12)], 16
    ids = [tokenizer.encode(document, add_special_tokens=False) for document in documents]
    everything = sum(map(len, ids)) // length
    windows = varied_windows(documents, tokenizer, length, everything, seed=0)
    first = varied_windows(documents, tokenizer, length, 6, seed=0)
    assert torch.equal(first, windows[:6])
    pieces = spaced(first.flatten().tolist()).split(spaced([tokenizer.eos_token_id]))
    assert len(pieces) > 6
    for piece, document in zip(pieces[:-1], ids, strict=False):
        assert f" {piece.strip()} " in spaced(document)
    used = Counter(windows.flatten().tolist())
    known = Counter(token for document in ids for token in document)
    assert all(used[token] <= known[token] for token in used if token != tokenizer.eos_token_id)
    assert not torch.equal(windows, varied_windows(documents, tokenizer, length, everything, seed=1))
    assert torch.equal(windows, varied_windows(documents, tokenizer, length, everything, seed=0))


def test_documents_need_an_eos_token_and_one_document_does_not(tokenizer: PreTrainedTokenizerFast) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert len(token_windows(SENTENCES[:1], without, 2))
    assert len(varied_windows(SENTENCES[:1], without, 2, 3, seed=0)) == 3
    with pytest.raises(DataError, match="no EOS token"):
        token_windows(SENTENCES[:2], without, 2)
    with pytest.raises(DataError, match="no EOS token"):
        varied_windows(SENTENCES[:2], without, 2, 9, seed=0)
