"""Documents from a file, a folder, a dataset of the hub, or the package, by one name."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from headfuse.errors import DataError
from headfuse.text import windows
from headfuse.text.arrow import read_hub
from headfuse.text.files import SUFFIXES, file_kind, listed, read_file, read_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_DATA = "default"
"""The texts that ship inside the package, prose and code in turn."""
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
_SHUFFLED_DOCUMENTS = 10_000
_SHUFFLED_CHARACTERS = 2**26


def read_documents(
    data: str, *, seed: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None, in_pieces: bool = False
) -> Iterator[str]:
    """Read documents one by one; empty ones are left out.

    A record holds its text in the field `text`, or a chat in `messages` (`role`, `content`) or `conversations` (also
    with ShareGPT's `from`, `value`), which the tokenizer's chat template renders.

    Args:
        data: `default` (the packaged texts); a .txt file (one document, nothing stripped); a file of records: .jsonl,
            .ndjson, .json (one record a line, or one array of them), .csv, .tsv (with a header line) or .parquet; a
            folder of such files, in which hidden files and metadata are skipped; a folder of
            `datasets.Dataset.save_to_disk`; or a dataset of the Hugging Face hub as `org/name`, `org/name:split` or
            `org/name/config:split` (split `train` by default). All but Parquet may be compressed: .gz, .bz2, .xz, .zst.
        seed: shuffle the documents (through a buffer, see `shuffled`); None keeps their order.
        tokenizer: has the chat template.
        in_pieces: give a long .txt file in the pieces that are tokenised, read one after the other, so that a few
            windows do not take the whole file; with a seed it is whole, as documents are shuffled.

    Raises:
        DataError: at once when there is no such data, while reading when it cannot be understood or holds no text.
    """
    piece = windows.TOKENISED_CHARACTERS if in_pieces and seed is None else None
    documents = not_empty(open_document(data, tokenizer, piece), data)
    return documents if seed is None else shuffled(documents, seed)


def check_data(data: str) -> None:
    """Raise DataError when there is no such text; its content is not read, and a hub is not asked."""
    open_document(data, None)


def open_document(data: str, tokenizer: PreTrainedTokenizerBase | None, piece: int | None = None) -> Iterator[str]:
    """Documents; with `piece`, a .txt file comes in pieces of this many characters, never whole."""
    if not data:  # Path("") would be the working directory: an unset variable of a script
        raise DataError("the name of the text is empty", where="--data", fix="give a text file, or leave it out")
    if data == DEFAULT_DATA:
        return chain.from_iterable(zip(packaged("prose"), packaged("code"), strict=True))
    path = Path(data)
    try:
        if path.is_dir():
            return read_folder(data, path, tokenizer, piece)
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds NUL; a folder that may not be searched
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot be read: {reason}", where=data, fix="check the path") from None
    if exists:
        if file_kind(path) is None:
            raise DataError(f"is not a {listed(SUFFIXES)} file", where=data, fix="rename or convert it")
        return read_file(path, tokenizer, piece)
    match = _HUB_ID.fullmatch(data)
    if match is None or file_kind(path) is not None:
        raise DataError(
            "no such file", where=data, fix="give a text file, a folder, a hub dataset like org/name, or `default`"
        )
    return read_hub(data, match["name"], match["config"], match["split"] or "train", tokenizer)


def shuffled(documents: Iterable[str], seed: int | str) -> Iterator[str]:
    """Shuffle a stream through a buffer of 10,000 documents or 64 M characters."""
    generator, buffer, characters = random.Random(seed), list[str](), 0
    for document in documents:
        buffer.append(document)
        characters += len(document)
        while len(buffer) > _SHUFFLED_DOCUMENTS or characters > _SHUFFLED_CHARACTERS:
            place = generator.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            characters -= len(buffer[-1])
            yield buffer.pop()
    generator.shuffle(buffer)
    yield from buffer


def not_empty(documents: Iterable[str], data: str) -> Iterator[str]:
    """The documents, after a check that there is text in them."""
    blank: list[str] | None = []
    """What came before the first word; None after it."""
    for document in documents:
        if blank is not None and (not document or document.isspace()):
            blank.append(document)
            continue
        yield from filter(None, blank or [])
        blank = None
        if document:
            yield document
    if blank is not None:
        raise DataError("holds no text", where=data, fix="give data with text in it")


def packaged(name: str) -> list[str]:
    """The documents of a text of the package: `prose` or `code`."""
    text = (resources.files("headfuse") / "data" / f"{name}.txt").read_text(encoding="utf-8")
    return [document for document in text.split("\f") if document]
