"""The stream of training batches, and what is held out from it."""

import json
from itertools import islice, takewhile
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from headfuse.errors import DataError
from headfuse.text import files as text
from headfuse.text.documents import open_document, read_documents
from headfuse.text.stream import TrainingText
from headfuse.text.windows import token_windows
from tests.text.corpus import SENTENCES, write_jsonl


def test_training_never_sees_what_is_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " + SENTENCES[i % 40] for i in range(100)])
    training = TrainingText(data, tokenizer, 16, seed=0)
    assert 1 <= len(training.validation) <= 16
    batches = list(takewhile(lambda batch: batch.epochs <= 2, training.batches(1)))
    for section in training.held_out:
        assert not any(section.split(" The")[0] + " The" in tokenizer.decode(batch.windows[0]) for batch in batches)
    first, second = ({tuple(b.windows[0].tolist()) for b in batches if b.epochs == n} for n in (1, 2))
    assert first != second
    again = TrainingText(data, tokenizer, 16, seed=0)
    assert torch.equal(again.validation, training.validation)
    assert all(torch.equal(a.windows, b.windows) for a, b in zip(again.batches(1), batches, strict=False))


def test_documents_with_eos_are_refused_where_eos_ends_a_document(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Turns of a chat end in EOS, too: an answer would not see its question."""
    chats = [f"chat {i} {SENTENCES[0]}{tokenizer.eos_token}{SENTENCES[1]}" for i in range(30)]
    data = write_jsonl(tmp_path / "a.jsonl", chats)
    next(TrainingText(data, tokenizer, 16, seed=0).batches(1))
    with pytest.raises(DataError, match="leave packing at joined"):
        next(TrainingText(data, tokenizer, 16, seed=0, whole=True).batches(1))


def test_a_stream_goes_on_from_any_state(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [f"first {i} " + SENTENCES[i % 40] for i in range(30)])
    b = write_jsonl(tmp_path / "b.jsonl", [f"second {i} " + SENTENCES[i % 40] for i in range(50)])
    training = TrainingText({a: 3, b: 1}, tokenizer, 16, seed=0)
    whole = list(islice(training.batches(3), 60))
    assert whole[-1].epochs > 2
    for start in (1, 17, 40):
        state = json.loads(json.dumps(whole[start - 1].state))
        rest = islice(TrainingText({a: 3, b: 1}, tokenizer, 16, seed=0).batches(3, state), 60 - start)
        assert all(torch.equal(x.windows, y.windows) for x, y in zip(whole[start:], rest, strict=True))


def test_a_mixture_keeps_its_shares(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [SENTENCES[i % 40].replace("sees", "A" * 40) for i in range(200)])
    b = write_jsonl(tmp_path / "b.jsonl", [SENTENCES[i % 40].replace("ships", "B") for i in range(200)])
    training = TrainingText({a: 0.75, b: 0.25}, tokenizer, 16, seed=0)
    *_, last = islice(training.batches(8), 40)
    tokens = [place["tokens"] for place in last.state["places"]]
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.02)
    assert any("A" in section for section in training.held_out)
    assert any("B" in section for section in training.held_out)


def test_long_text_files_are_read_in_pieces(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\r\n".join(f"Line {i} é" for i in range(30_000))
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert "".join(open_document(str(tmp_path / "a.txt"), None, 100)) == content
    monkeypatch.setattr(text, "_decoded", lambda *_: pytest.fail("read whole"))
    assert TrainingText(str(tmp_path / "a.txt"), tokenizer, 16, seed=0).validation.shape == (16, 16)
    monkeypatch.undo()
    (tmp_path / "b.txt").write_bytes(b"caf\xe9" + content.encode())
    with pytest.raises(DataError, match=r"b.txt: is not UTF-8 text \(byte 3\)"):
        TrainingText(str(tmp_path / "b.txt"), tokenizer, 16, seed=0)


def test_validation_text_of_its_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [SENTENCES[i % 40] for i in range(50)])
    b = write_jsonl(tmp_path / "b.jsonl", [f"other {i}" for i in range(50)])
    training = TrainingText(a, tokenizer, 16, seed=0, validation=b, validation_windows=5)
    assert not training.held_out
    assert torch.equal(training.validation, token_windows(read_documents(b), tokenizer, 16, 5))


def test_a_single_book_is_divided(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_text("\n".join(f"Chapter {i}\n{SENTENCES[i % 40]}" for i in range(400)))
    training = TrainingText(str(tmp_path / "book.txt"), tokenizer, 8, seed=0)
    assert len(training.validation) == 16
    assert training.held_out


def test_too_little_training_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("Just a few words.")
    training = TrainingText(str(tmp_path / "a.txt"), tokenizer, 512, seed=0)
    assert not len(training.validation)
    with pytest.raises(DataError, match="does not fill one window of 512 tokens"):
        next(training.batches(1))
