import bz2
import copy
import gzip
import json
import lzma
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from headfuse.config.values import data_name, parse_data
from headfuse.errors import DataError
from headfuse.evaluation.passkey import passkey_prompts
from headfuse.evaluation.perplexity import evaluation_text, nll_protocol
from headfuse.text import documents as text
from headfuse.text.calibration import CalibrationText
from headfuse.text.documents import cut, open_document, read_documents, shuffled
from headfuse.text.stream import TrainingText
from headfuse.text.windows import iter_windows, token_windows, varied_windows

SENTENCES = [f"The {animal} sees {count} ships\n on the river." for animal in ("cat", "dog") for count in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def write_jsonl(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": document, "source": "x"}) + "\n" for document in documents))
    return str(path)


# ---------------------------------------------------------------- documents


def test_txt_is_one_document_as_it_is(tmp_path: Path) -> None:
    content = "\n  First line \r\nSecond\u2028 line é\n\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert list(read_documents(str(tmp_path / "a.txt"))) == [content]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_lines_keep_their_order(tmp_path: Path, suffix: str) -> None:
    data = write_jsonl(tmp_path / f"a.{suffix}", ["one\u2028", "", "two\n"])
    Path(data).write_bytes(b"\xef\xbb\xbf" + Path(data).read_bytes())  # a byte order mark, as Windows writes it
    assert list(read_documents(data)) == ["one\u2028", "two\n"]


def test_lone_surrogates_can_be_tokenised(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert tokenizer(*read_documents(str(tmp_path / "a.jsonl"))).input_ids


def test_parquet_and_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "deep").mkdir()
    datasets.Dataset.from_dict({"text": ["p1", "p2"]}).to_parquet(str(tmp_path / "b.parquet"))
    (tmp_path / "a.txt").write_text("t")
    write_jsonl(tmp_path / "deep" / "c.jsonl", ["j"])
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert list(read_documents(str(tmp_path))) == ["t", "p1", "p2", "j"]


def test_packaged_text_is_divided_at_form_feeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "default.txt").write_text("one\ftwo\f", encoding="utf-8")
    monkeypatch.setattr(text.resources, "files", lambda package: tmp_path)
    assert list(read_documents("default")) == ["one", "two"]


def test_shuffling_is_a_permutation_that_the_seed_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"document {i}" for i in range(100)]
    data = write_jsonl(tmp_path / "a.jsonl", documents)
    for size in (10_000, 7):
        monkeypatch.setattr(text, "_SHUFFLED_DOCUMENTS", size)
        order = list(read_documents(data, seed=0))
        assert sorted(order) == sorted(documents)
        assert order != documents
        assert order == list(read_documents(data, seed=0))
        assert order != list(read_documents(data, seed=1))


def test_shuffling_reads_a_stream_no_further_than_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_SHUFFLED_DOCUMENTS", 5)

    def endless() -> Iterator[str]:
        while True:
            yield "x"

    assert list(islice(shuffled(endless(), 0), 20)) == ["x"] * 20


@pytest.mark.parametrize("limit", [1, 7, 30, 1000])
def test_cutting_loses_nothing(limit: int) -> None:
    document = "\n".join(SENTENCES) + "a" * 50
    pieces = list(cut(document, limit))
    assert "".join(pieces) == document
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_cutting_prefers_line_ends() -> None:
    assert list(cut("one two\nthree four five", 12)) == ["one two\n", "three four ", "five"]


def test_data_name_holds_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("t")
    assert data_name(str(tmp_path / "a.txt")) == "a.txt"
    assert data_name("org/name:train") == "org/name:train"


def missing(folder: Path) -> str:
    return str(folder / "missing.jsonl")


def not_a_name(folder: Path) -> str:
    return "what is this?"


def empty(folder: Path) -> str:
    (folder / "a.txt").touch()
    return str(folder / "a.txt")


def empty_json(folder: Path) -> str:
    (folder / "a.jsonl").write_text('\n{"text": ""}\n')
    return str(folder / "a.jsonl")


def empty_folder(folder: Path) -> str:
    return str(folder)


def unknown_suffix(folder: Path) -> str:
    (folder / "a.docx").write_text("text\nhello\n")
    return str(folder / "a.docx")


def latin1(folder: Path) -> str:
    (folder / "a.txt").write_bytes("café".encode("latin-1"))
    return str(folder / "a.txt")


def latin1_line(folder: Path) -> str:
    (folder / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    return str(folder / "a.jsonl")


def bad_json(folder: Path) -> str:
    (folder / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"\n')
    return str(folder / "a.jsonl")


def array(folder: Path) -> str:
    (folder / "a.json").write_text('["a", "b"]')
    return str(folder / "a.json")


def other_fields(folder: Path) -> str:
    (folder / "a.jsonl").write_text('{"text": "a"}\n{"content": "b", "id": 1}\n')
    return str(folder / "a.jsonl")


def number_as_text(folder: Path) -> str:
    (folder / "a.jsonl").write_text('{"text": 3}\n')
    return str(folder / "a.jsonl")


def bad_parquet(folder: Path) -> str:
    (folder / "a.parquet").write_bytes(b"PAR1 but not really")
    return str(folder / "a.parquet")


def parquet_fields(folder: Path) -> str:
    pytest.importorskip("datasets").Dataset.from_dict({"content": ["p"]}).to_parquet(str(folder / "a.parquet"))
    return str(folder / "a.parquet")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "missing.jsonl: no such file"),
        (not_a_name, "what is this?: no such file"),
        (empty, "a.txt: holds no text"),
        (empty_json, "a.jsonl: holds no text"),
        (empty_folder, "the folder holds no .txt, .jsonl, .ndjson, .json, .csv, .tsv or .parquet file"),
        (unknown_suffix, "a.docx: is not a .txt"),
        (latin1, "a.txt: is not UTF-8 text (byte 3)"),
        (latin1_line, "a.jsonl, line 2: is not UTF-8"),
        (bad_json, "a.jsonl, line 3: is not valid JSON"),
        (array, "a.json, item 1: is not a JSON object"),
        (other_fields, 'a.jsonl, line 2: has no field "text"; its fields are: content, id'),
        (number_as_text, 'a.jsonl, line 1: the field "text" holds int'),
        (bad_parquet, "a.parquet: is not a readable parquet file"),
        (parquet_fields, 'a.parquet, row 1: has no field "text"; its fields are: content'),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_data_is_one_clear_error(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read_documents(make(tmp_path)))
    assert message in str(caught.value)
    assert caught.value.fix


def test_missing_data_is_an_error_before_reading() -> None:
    with pytest.raises(DataError):
        read_documents("no/such/file.txt")


def test_unreachable_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        calls.append((args, options["split"]))
        if args[0] == "org/private":
            raise ConnectionError("Couldn't reach it\nat all")
        return [{"text": "from the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(text, "_ask_hub", lambda name: None)
    assert list(read_documents("org/name/config-1:test")) == ["from the hub"]
    assert list(read_documents("org/name")) == ["from the hub"]
    assert calls == [(("org/name", "config-1"), "test"), (("org/name", None), "train")]
    with pytest.raises(DataError, match=r"org/private: neither .* \(Couldn't reach it\)"):
        list(read_documents("org/private"))


# ---------------------------------------------------------------- token windows


def packed(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that the windows must hold, the slow and obvious way."""
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.eos_token_id] * bool(ids) + tokenizer.encode(document, add_special_tokens=False)
    return ids


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


# ---------------------------------------------------------------- training text


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


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ("a.jsonl", {"a.jsonl": 1.0}),
        (["a.jsonl=0.7", "org/name/config:split=3"], {"a.jsonl": 0.7, "org/name/config:split": 3.0}),
        (["x=y.txt", "b=1e-2"], {"x=y.txt": 1.0, "b": 0.01}),
        ({"a": 2}, {"a": 2.0}),
    ],
)
def test_texts_and_their_weights(given: Any, weights: dict[str, float]) -> None:
    assert parse_data(given) == weights


@pytest.mark.parametrize("given", [[], ["a=0"], ["a=-1"], ["a=nan"], ["a=1-2"], ["a", "a=2"], {"a": float("inf")}])
def test_no_mixture(given: Any) -> None:
    with pytest.raises(DataError):
        parse_data(given)


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


# ---------------------------------------------------------------- folders and files as they come


def record(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def test_hidden_files_and_metadata_beside_data_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(record("kept"))
    (tmp_path / "notes.txt").write_text("kept, too")
    for name in ("dataset_infos.json", "dataset_dict.old/._x.jsonl", "._train.jsonl", ".cache/x.txt", "__MACOSX/a.txt",
                 "README.txt", "LICENSE.txt", "SHA256SUMS.txt", "checksums.txt", ".gitattributes"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'\0\5{"default": {}}\xff')
    assert list(read_documents(str(tmp_path))) == ["kept, too", "kept"]
    assert list(read_documents(write_jsonl(tmp_path / "state.json", ["asked for"]))) == ["asked for"]


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": ["one", "two"]})
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": saved.select([0]), "train": saved}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"a": saved, "b": saved}).save_to_disk(str(tmp_path / "others"))
    assert list(read_documents(str(tmp_path / "saved"))) == ["one", "two"]
    assert list(read_documents(str(tmp_path / "splits"))) == ["one", "two"]
    assert list(read_documents(str(tmp_path / "splits" / "test"))) == ["one"]
    with pytest.raises(DataError, match="several splits") as caught:
        list(read_documents(str(tmp_path / "others")))
    assert "a, b" in str(caught.value.fix)
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="save_to_disk"):
        list(read_documents(str(tmp_path / "saved")))


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    compressions: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
    }  # fmt: skip
    compress = compressions[suffix]
    lines = "".join(record(str(i) * 99) for i in range(400)).encode()
    (tmp_path / f"a.JSONL.{suffix}").write_bytes(compress(lines + b"{"))
    (tmp_path / f"b.txt.{suffix}").write_bytes(compress(b"as it is\r\n"))
    assert list(read_documents(str(tmp_path / f"b.txt.{suffix}"))) == ["as it is\r\n"]
    assert "".join(open_document(str(tmp_path / f"b.txt.{suffix}"), None, 3)) == "as it is\r\n"
    with pytest.raises(DataError, match="line 401: is not valid JSON"):
        list(read_documents(str(tmp_path / f"a.JSONL.{suffix}")))
    for content in (compress(lines)[:-20], b"not compressed"):
        (tmp_path / f"a.JSONL.{suffix}").write_bytes(content)
        with pytest.raises(DataError, match="is not a complete"):
            list(read_documents(str(tmp_path / f"a.JSONL.{suffix}")))


def test_a_compression_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.compression import compr

    monkeypatch.delitem(compr, "zstd", raising=False)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(DataError, match="compressed by zstd") as caught:
        list(read_documents(str(tmp_path / "a.jsonl.zst")))
    assert "pip install zstandard" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", record("one") + record("two, 2")),
        ("a.ndjson", record("one") + record("two, 2")),
        ("a.json", '\ufeff [{"text": "one"},\n {"text": "two, 2"}]\n'),
        ("a.csv", '\ufeffid,text\r\n1,one\r\n2,"two, 2"\r\n'),
        ("a.TSV", "id\ttext\n1\tone\n2\ttwo, 2\n"),
    ],
)
def test_spellings_and_forms_of_records(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert list(read_documents(str(tmp_path / name))) == ["one", "two, 2"]


def test_text_in_tables_stays_text(tmp_path: Path) -> None:
    rows = ["12", "NA", "x" * 200_000, "line\nbreak", "1.50"]
    (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{row}"\n' for row in rows))
    assert list(read_documents(str(tmp_path / "a.csv"))) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,text\n1,a\n2\n", "line 3: has another number of fields"),
        ("a.csv", b"text\ncaf\xe9\n", "is not UTF-8"),
        ("a.csv", b'text\n"a', "is not valid"),
        ("a.csv", b"body\na\n", 'line 2: has no field "text"'),
        ("a.json", b'[{"text": "a"},', "line 1: is not valid JSON"),
        ("a.json", b'{"text":\n "a"}', "line 1: is not valid JSON"),
        ("a.jsonl", b"9" * 5000, "line 1: is not valid JSON"),
        ("a.txt", b" \r\n\n\t" * 9000, "holds no text"),
        ("a.txt", "the head".encode("utf-16-le"), "holds NUL"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of Git LFS"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of Git LFS"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of Git LFS"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(islice(read_documents(str(tmp_path / name)), 1000))
    assert name in str(caught.value.where)
    assert caught.value.fix


def test_blank_text_before_the_first_word_is_kept(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [" \n", "", "word", " "])
    assert list(read_documents(data)) == [" \n", "word", " "]


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe head\r\n")
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["the head\r\n"]
    assert list(open_document(str(tmp_path / "a.txt"), None, 100)) == ["the head\r\n"]


def test_a_named_pipe_is_read_whole(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    lines = "".join(record(f"document {i}") for i in range(100))
    writer = threading.Thread(target=(tmp_path / "a.jsonl").write_text, args=(lines,))
    writer.start()
    assert len(list(read_documents(str(tmp_path / "a.jsonl")))) == 100
    writer.join()


def test_a_name_that_is_too_long_is_one_error() -> None:
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_documents("x" * 300 + ".txt")


# ---------------------------------------------------------------- chats


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The cat."}]
SHARE = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "The cat."}]


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHARE}, {"conversations": CHAT}])
def test_chats_are_rendered_by_the_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**row, "source": "chat"}) + "\n" + record("plain"))
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    documents = list(read_documents(str(tmp_path / "a.jsonl"), tokenizer=chatting))
    assert documents == ["<s>[user]Who?[assistant]The cat.", "plain"]
    assert isinstance(documents[0], text.Document)
    assert documents[0].source == "chat"
    with pytest.raises(DataError, match="line 1: is a chat, and the tokenizer has no chat template"):
        list(read_documents(str(tmp_path / "a.jsonl"), tokenizer=tokenizer))
    chatting.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"the chat template refuses it .*roles must alternate"):
        list(read_documents(str(tmp_path / "a.jsonl"), tokenizer=chatting))


@pytest.mark.parametrize("messages", ["text", [], ["text"], [{"content": "no role"}], [{"from": "human"}]])
def test_chats_of_another_form(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, messages: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match="line 1: 'messages'"):
        list(read_documents(str(tmp_path / "a.jsonl"), tokenizer=tokenizer))


# ---------------------------------------------------------------- BOS


@pytest.fixture(scope="module")
def beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, but it puts BOS before every text, as those of llama and gemma do."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


def test_windows_begin_with_bos_where_the_tokenizer_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, beginning: PreTrainedTokenizerFast
) -> None:
    assert text.start_token(tokenizer) is None
    assert text.start_token(beginning) == 0
    plain, windows = token_windows(SENTENCES, tokenizer, 15), token_windows(SENTENCES, beginning, 16)
    assert (windows[:, 0] == 0).all()
    assert torch.equal(windows[:, 1:], plain)
    assert torch.equal(torch.stack(list(iter_windows(SENTENCES, beginning, 16))), windows)
    varied = varied_windows(SENTENCES, beginning, 16, 9, seed=0)
    assert torch.equal(varied[:, 1:], varied_windows(SENTENCES, tokenizer, 15, 9, seed=0))
    assert (varied[:, 0] == 0).all()
    assert not (varied[:, 1:] == 0).any()


def test_training_windows_begin_with_bos(tmp_path: Path, beginning: PreTrainedTokenizerFast) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [f"{i} " + SENTENCES[i % 40] for i in range(60)])
    training = TrainingText(data, beginning, 16, seed=0)
    first, second = islice(training.batches(3), 2)
    for windows in (training.validation, first.windows, second.windows):
        assert windows.shape[1] == 16
        assert (windows[:, 0] == 0).all()
        assert not (windows[:, 1:] == 0).any()
    assert torch.equal(next(training.batches(3, first.state)).windows, second.windows)


@pytest.mark.parametrize("stride", [16, 15, 4])
def test_evaluation_predicts_every_token_once_after_bos(
    tokenizer: PreTrainedTokenizerFast, beginning: PreTrainedTokenizerFast, stride: int
) -> None:
    found = evaluation_text(SENTENCES, beginning, 16, 5, stride)
    assert (found.windows[:, 0] == 0).all()
    assert found.windows.shape == (5, 16)
    assert found.domains.shape == found.scored.shape == (5, 15)
    predicted = found.windows[:, 1:][found.scored].tolist()
    assert predicted == packed(SENTENCES, tokenizer)[: len(predicted)]
    assert len(predicted) == 15 + 4 * min(stride, 15)
    assert "each begins with BOS" in nll_protocol(found, stride)


def test_start_windows_begin_with_bos(beginning: PreTrainedTokenizerFast) -> None:
    windows = token_windows(SENTENCES, beginning, 64, 4)
    for calibration in (CalibrationText.split(windows, 1, 0), CalibrationText.split(windows, 1, 0).part(0.7)):
        assert (calibration.starts[:, 0] == 0).all()
        assert not (calibration.starts[:, 1:] == 0).any()
        assert calibration.starts.shape[1] == 4


def test_chats_and_passkeys_have_one_bos(tmp_path: Path, beginning: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (document,) = read_documents(str(tmp_path / "a.jsonl"), tokenizer=beginning)
    assert document == "[user]Who?[assistant]The cat."
    ((prompt, _),) = passkey_prompts(beginning, 400, 1)
    assert len(prompt) == 400
    assert prompt[0] == 0
    assert 0 not in prompt[1:]
