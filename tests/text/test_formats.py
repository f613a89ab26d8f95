"""Files and folders in all forms that a text can have."""

import bz2
import gzip
import lzma
import os
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from headfuse.errors import DataError
from headfuse.text.documents import open_document, read_documents
from tests.text.corpus import record, write_jsonl


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
        ("a.csv", b"id,text\n1,a\n2\n", "line 3: has a different number of fields"),
        ("a.csv", b"text\ncaf\xe9\n", "is not UTF-8"),
        ("a.csv", b'text\n"a', "is not valid"),
        ("a.csv", b"body\na\n", 'line 2: has no field "text"'),
        ("a.json", b'[{"text": "a"},', "line 1: is not valid JSON"),
        ("a.json", b'{"text":\n "a"}', "line 1: is not valid JSON"),
        ("a.jsonl", b"9" * 5000, "line 1: is not valid JSON"),
        ("a.txt", b" \r\n\n\t" * 9000, "holds no text"),
        ("a.txt", "the head".encode("utf-16-le"), "holds NUL"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
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
