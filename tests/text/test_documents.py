"""Documents from files, folders and the hub."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from headfuse.errors import DataError
from headfuse.text import arrow
from headfuse.text import documents as text
from headfuse.text.documents import read_documents, shuffled
from headfuse.text.windows import cut
from tests.text.corpus import SENTENCES, write_jsonl


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


def test_a_parquet_file_is_that_of_its_name(tmp_path: Path) -> None:
    """Not a pattern of names."""
    datasets = pytest.importorskip("datasets")
    for number, name in enumerate(("a[1].parquet", "a1.parquet", "b*.parquet", "bc.parquet", "c?.parquet")):
        datasets.Dataset.from_dict({"text": [str(number)]}).to_parquet(str(tmp_path / name))
    assert list(read_documents(str(tmp_path / "a[1].parquet"))) == ["0"]
    assert list(read_documents(str(tmp_path / "b*.parquet"))) == ["2"]
    assert sorted(read_documents(str(tmp_path))) == ["0", "1", "2", "3", "4"]


def test_packaged_text_is_divided_at_form_feeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prose.txt").write_text("one\ftwo\f", encoding="utf-8")
    (tmp_path / "data" / "code.txt").write_text("1\f2", encoding="utf-8")
    monkeypatch.setattr(text.resources, "files", lambda package: tmp_path)
    assert list(read_documents("default")) == ["one", "1", "two", "2"]


def test_packaged_text_has_as_much_code_as_prose() -> None:
    """Documents in turn: calibration reads a piece of each, and code that nothing was fitted to loses most."""
    documents = list(read_documents("default"))
    assert len(documents) == len(set(documents)) == 66
    assert all(compile(code, "code", "exec") for code in documents[1::2])


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
    monkeypatch.setattr(arrow, "_ask_hub", lambda name: None)
    assert list(read_documents("org/name/config-1:test")) == ["from the hub"]
    assert list(read_documents("org/name")) == ["from the hub"]
    assert calls == [(("org/name", "config-1"), "test"), (("org/name", None), "train")]
    with pytest.raises(DataError, match=r"org/private: neither .* \(Couldn't reach it\)"):
        list(read_documents("org/private"))
