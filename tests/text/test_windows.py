"""Token windows."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import headfuse
from headfuse.errors import DataError
from headfuse.text.documents import read_documents
from headfuse.text.records import text_of
from headfuse.text.windows import iter_windows, labelled_tokens, token_windows, varied_windows
from tests.support.tiny_models import tiny_model
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


def test_every_token_has_the_source_of_its_document(tokenizer: PreTrainedTokenizerFast) -> None:
    """The EOS that ends a document is its own, not the next one's."""
    documents = [
        text_of({"text": text, "source": source}, "", None) for text, source in zip(SENTENCES[:4], "aabc", strict=True)
    ]
    ids, places, names = labelled_tokens(documents, tokenizer, 1000)
    assert ids.tolist() == packed([str(document) for document in documents], tokenizer)
    expected: list[str] = []
    for document, source in zip(documents, "aabc", strict=True):
        count = len(tokenizer.encode(str(document), add_special_tokens=False)) + 1
        expected += [source] * count
    assert [names[place] for place in places] == expected[:-1]


def test_a_long_text_file_is_read_as_far_as_it_must_to_the_same_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headfuse.text.windows.TOKENISED_CHARACTERS", 100)
    text = "\r\n".join(SENTENCES) + "a" * 250 + "\n" + " ".join(SENTENCES)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"The dog")
    pieces = list(read_documents(str(tmp_path / "a.txt"), in_pieces=True))
    assert max(map(len, pieces)) <= 100
    assert torch.equal(token_windows(pieces, tokenizer, 8), token_windows([text], tokenizer, 8))
    folder = list(read_documents(str(tmp_path), in_pieces=True))
    assert torch.equal(token_windows(folder, tokenizer, 1), token_windows([text, "The dog"], tokenizer, 1))
    assert set(read_documents(str(tmp_path), in_pieces=True, seed=0)) == {text, "The dog"}  # whole: they are shuffled


def test_evaluation_reads_no_further_than_its_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headfuse.text.windows.TOKENISED_CHARACTERS", 1000)
    model = tiny_model(tmp_path / "model")
    text = (tmp_path / "text.txt").read_bytes()
    (tmp_path / "long.txt").write_bytes(text * 400 + b"\xff")  # what is not UTF-8 is 4 MB away
    options: dict[str, Any] = {"samples": 2, "sequence_length": 16}
    found = headfuse.evaluate(str(model), data=str(tmp_path / "long.txt"), **options)
    assert found.model == headfuse.evaluate(str(model), data=str(tmp_path / "text.txt"), **options).model
