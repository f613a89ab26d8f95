"""Documents from files and folders: plain text, JSON, tables, Parquet, compressed or not."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from headfuse.checkpoint.inputs import begins_as_pointer
from headfuse.errors import DataError
from headfuse.text.arrow import read_parquet, read_saved
from headfuse.text.records import Continued, reason_of, text_of
from headfuse.text.windows import cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""Suffix after those above, and the name of the compression in fsspec."""
_BLOCK = 2**20
"""Characters of a text file that are read at a time."""
_METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|croissant)\.json|(readme|license|notice|checksums|.*sha256.*|.*md5.*)\.txt",
    re.I,
)
"""Metadata files that may be beside data and hold no text."""


def file_kind(path: Path) -> str | None:
    """The kind of a file by its name: one of `SUFFIXES`; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _COMPRESSIONS else suffixes[-1] if suffixes else ""
    packed_parquet = kind == ".parquet" and suffixes[-1] != kind
    return kind if kind in SUFFIXES and not packed_parquet else None


def listed(words: Iterable[str]) -> str:
    """Words as a sentence lists them: `a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}"


def read_folder(data: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None, piece: int | None) -> Iterator[str]:
    """The documents of every data file in a folder, and of the saved datasets in it.

    Raises:
        DataError: at once where there is none, while reading where one cannot be understood.
    """
    parts = list(_parts(folder))
    if not parts:
        raise DataError(f"the folder holds no {listed(SUFFIXES)} file", where=data, fix="give a folder with text in it")
    return (
        document
        for part in parts
        for document in (read_saved(part, tokenizer) if part.is_dir() else read_file(part, tokenizer, piece))
    )


def _parts(folder: Path) -> Iterator[Path]:
    """The data files of a folder and of those in it, and the folders of `save_to_disk`, in the order of their names."""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    if saved or (folder / "dataset_dict.json").is_file():
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")):  # .git, .cache, ._name and __MACOSX of macOS
            continue
        if path.is_dir():
            if not path.is_symlink():  # it may lead back here
                yield from _parts(path)
        elif file_kind(path) is not None and not _METADATA.fullmatch(path.name) and path.is_file():
            yield path


def read_file(path: Path, tokenizer: PreTrainedTokenizerBase | None, piece: int | None) -> Iterator[str]:
    """The documents of one file; with `piece`, those of a .txt file are pieces of this many characters.

    Raises:
        DataError: while reading, where it cannot be understood.
    """
    kind = file_kind(path)
    try:
        if kind == ".txt":
            yield from _read_text(path, piece)
        elif kind == ".parquet":
            with _opened(path):  # a Git LFS pointer is named as one
                pass
            yield from read_parquet(path, tokenizer)
        else:
            for record, where in _records(path, kind):
                yield text_of(record, where, tokenizer)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read: {reason}", where=path, fix="check the file and its permissions") from None


def _records(path: Path, kind: str | None) -> Iterator[tuple[Any, str]]:
    """Each record of a file, with its place for error messages."""
    with _opened(path) as stream:
        if kind in (".csv", ".tsv"):
            yield from _table_rows(stream, path, "\t" if kind == ".tsv" else ",")
            return
        for number, line in enumerate(stream, 1):
            if kind == ".json" and line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                where = f"{path}, line {number}"
                for item, record in enumerate(_json(line + stream.read(), where, "check the array"), 1):
                    yield record, f"{path}, item {item}"
                return
            if line.strip():
                where, fix = f"{path}, line {number}", "write one JSON object a line, or one array of them in a .json"
                yield _json(line, where, fix), where


def _table_rows(stream: IO[bytes], path: Path, delimiter: str) -> Iterator[tuple[dict[str, Any], str]]:
    csv.field_size_limit(sys.maxsize)  # documents are longer than the module expects
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    "has a different number of fields from the first line", where=where, fix="quote the fields"
                )
            yield row, where
    except csv.Error as error:
        raise DataError(
            f"is not valid: {error}", where=f"{path}, line {rows.line_num}", fix="write the file again"
        ) from None
    except UnicodeDecodeError:
        where = f"{path}, after line {rows.line_num}"
        raise DataError("is not UTF-8 text", where=where, fix="convert the file to UTF-8") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its suffix."""
    import zlib
    from lzma import LZMAError

    name = _COMPRESSIONS.get(path.suffix.lower())
    with path.open("rb") as stored:
        if begins_as_pointer(stored):
            raise DataError("is a Git LFS pointer, not the data itself", where=path, fix="fetch it with git lfs pull")
        if name is None:
            yield stored
            return
        from fsspec.compression import compr

        if name not in compr:
            raise DataError(f"is compressed by {name}", where=path, fix="pip install zstandard, or decompress it")
        try:
            with compr[name](stored, mode="rb") as stream:
                yield stream
        except DataError:
            raise
        except Exception as error:
            known = isinstance(error, (EOFError, zlib.error, LZMAError)) or type(error).__name__ == "ZstdError"
            if not known and not (isinstance(error, OSError) and error.errno is None):
                raise
            raise DataError(
                f"is not a complete {name} file ({reason_of(error)})", where=path, fix="copy or download it again"
            ) from None


def _read_text(path: Path, limit: int | None) -> Iterator[str]:
    """One document; with a limit, in pieces of at most this many characters, all but the first `Continued`."""
    with _opened(path) as stream:
        if limit is None:
            yield _without_nul(_decoded(stream.read(), str(path)).removeprefix("\ufeff"), path)
            return
        text, rest, kind = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), "", str
        try:
            while block := text.read(_BLOCK):
                *pieces, rest = cut(rest + _without_nul(block, path), limit)
                for piece in pieces:
                    yield kind(piece)
                    kind = Continued
        except UnicodeDecodeError:
            with _opened(path) as again:
                _decoded(again.read(), str(path))  # the message tells the place in the file
        yield kind(rest)


def _without_nul(text: str, path: Path) -> str:
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8
        fix = "convert the file to UTF-8, or give a file of text"
        raise DataError("holds NUL bytes: it is UTF-16, or not text", where=path, fix=fix)
    return text


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8 text (byte {error.start})", where=where, fix="convert the file to UTF-8"
        ) from None


def _json(text: bytes, where: str, fix: str) -> Any:
    try:
        return json.loads(_decoded(text, where).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of 5000 digits
        raise DataError(f"is not valid JSON: {error}", where=where, fix=fix) from None
