"""Documents from files, folders and hub datasets."""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from headfuse.checkpoint.inputs import begins_as_pointer
from headfuse.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
DEFAULT_DATA = "default"
"""The text that ships inside the package: generic prose."""
_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""Suffix after those above, and the name of the compression in fsspec."""
_METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|croissant)\.json|(readme|license|notice|checksums|.*sha256.*|.*md5.*)\.txt",
    re.I,
)
"""Files that lie beside data and hold none."""
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
_FIELD = 'each record needs its text in a field "text", like {"text": "..."}, or a chat in "messages"'
_HUB_TIMEOUT = 10
"""Seconds."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
"""Speakers in the ShareGPT form that chat templates call otherwise."""
_SHUFFLED_DOCUMENTS = 10_000
_SHUFFLED_CHARACTERS = 2**26
TOKENISED_CHARACTERS = 2**21
SECTION_CHARACTERS = 16
"""Characters of a section for each token of a window."""
HELD_OUT_EVERY = 16
"""One in so many sections is held out, until they fill the validation windows."""
VALIDATION_WINDOWS = 16


class Document(str):
    """A text, and the record's field `source`, which names its domain; empty where there is none."""

    __slots__ = ("source",)
    source: str


def read_documents(
    data: str, *, seed: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[str]:
    """Read documents one by one; empty ones are left out.

    A record holds its text in the field `text`, or a chat in `messages` (`role`, `content`) or `conversations` (also
    with ShareGPT's `from`, `value`), which the tokenizer's chat template renders.

    Args:
        data: `default` (the packaged text); a .txt file (one document, nothing stripped); a file of records: .jsonl,
            .ndjson, .json (one record a line, or one array of them), .csv, .tsv (with a header line) or .parquet; a
            folder of such files, in which hidden files and metadata are skipped; a folder of
            `datasets.Dataset.save_to_disk`; or a dataset of the Hugging Face hub as `org/name`, `org/name:split` or
            `org/name/config:split` (split `train` by default). All but Parquet may be compressed: .gz, .bz2, .xz, .zst.
        seed: shuffle the documents (through a buffer, see `shuffled`); None keeps their order.
        tokenizer: has the chat template.

    Raises:
        DataError: at once when there is no such data, while reading when it cannot be understood or holds no text.
    """
    documents = not_empty(open_document(data, tokenizer), data)
    return documents if seed is None else shuffled(documents, seed)


def check_data(data: str) -> None:
    """Raise DataError when there is no such text; its content is not read, and a hub is not asked."""
    open_document(data, None)


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


def cut(text: str, limit: int) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters, after a line end or a space where there is one."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or text.rfind(" ", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def open_document(data: str, tokenizer: PreTrainedTokenizerBase | None, piece: int | None = None) -> Iterator[str]:
    """Documents; with `piece`, a .txt file comes in pieces of so many characters, never whole."""
    if not data:  # Path("") would be the working directory: an unset variable of a script
        raise DataError("the name of the text is empty", where="--data", fix="give a text file, or leave it out")
    if data == DEFAULT_DATA:
        return _packaged()
    path = Path(data)
    try:
        if path.is_dir():
            return _read_folder(data, path, tokenizer, piece)
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds NUL; a folder that may not be searched
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot be read: {reason}", where=data, fix="check the path") from None
    if exists:
        if _kind(path) is None:
            raise DataError(f"is not a {_listed(_SUFFIXES)} file", where=data, fix="rename or convert it")
        return _read_file(path, tokenizer, piece)
    match = _HUB_ID.fullmatch(data)
    if match is None or _kind(path) is not None:
        raise DataError(
            "no such file", where=data, fix="give a text file, a folder, a hub dataset like org/name, or `default`"
        )
    return _read_hub(data, match["name"], match["config"], match["split"] or "train", tokenizer)


def _kind(path: Path) -> str | None:
    """What a file holds by its name: one of `_SUFFIXES`; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _COMPRESSIONS else suffixes[-1] if suffixes else ""
    packed_parquet = kind == ".parquet" and suffixes[-1] != kind
    return kind if kind in _SUFFIXES and not packed_parquet else None


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"


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


def _packaged() -> Iterator[str]:
    text = (resources.files("headfuse") / "data" / "default.txt").read_text(encoding="utf-8")
    yield from text.split("\f")


def _read_folder(
    data: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None, piece: int | None
) -> Iterator[str]:
    parts = list(_parts(folder))
    if not parts:
        raise DataError(
            f"the folder holds no {_listed(_SUFFIXES)} file", where=data, fix="give a folder with text in it"
        )
    return (
        document
        for part in parts
        for document in (_read_saved(part, tokenizer) if part.is_dir() else _read_file(part, tokenizer, piece))
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
        elif _kind(path) is not None and not _METADATA.fullmatch(path.name) and path.is_file():
            yield path


def _read_file(path: Path, tokenizer: PreTrainedTokenizerBase | None, piece: int | None) -> Iterator[str]:
    kind = _kind(path)
    try:
        if kind == ".txt":
            yield from _read_text(path, piece)
        elif kind == ".parquet":
            with _opened(path):  # a pointer of Git LFS is named as one
                pass
            yield from _read_parquet(path, tokenizer)
        else:
            for record, where in _records(path, kind):
                yield _text_of(record, where, tokenizer)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read: {reason}", where=path, fix="check the file and its permissions") from None


def _records(path: Path, kind: str | None) -> Iterator[tuple[Any, str]]:
    """Each record of a file, and how an error names its place."""
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
                raise DataError("has another number of fields than the first line", where=where, fix="quote the fields")
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
            raise DataError(
                "is a pointer of Git LFS, not the data itself", where=path, fix="fetch it with git lfs pull"
            )
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
                f"is not a complete {name} file ({_reason(error)})", where=path, fix="copy or download it again"
            ) from None


def _read_text(path: Path, limit: int | None) -> Iterator[str]:
    """One document; with a limit, in pieces of so many characters."""
    with _opened(path) as stream:
        if limit is None:
            yield _without_nul(_decoded(stream.read(), str(path)).removeprefix("\ufeff"), path)
            return
        text, rest = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), ""
        try:
            while block := text.read(64 * limit):
                *pieces, rest = cut(rest + _without_nul(block, path), limit)
                yield from pieces
        except UnicodeDecodeError:
            with _opened(path) as again:
                _decoded(again.read(), str(path))  # the message tells the place in the file
        yield rest


def _without_nul(text: str, path: Path) -> str:
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8
        fix = "convert the file to UTF-8, or give a file of text"
        raise DataError("holds NUL: UTF-16, or no text at all", where=path, fix=fix)
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


def _text_of(record: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The document of a record, with its source."""
    if not isinstance(record, dict):
        raise DataError("is not a JSON object", where=where, fix=_FIELD)
    chats = [field for field in ("messages", "conversations") if field in record]
    if "text" in record or not chats:
        text = _text_field(record, where)
    else:
        text = _rendered(record, chats[0], where, tokenizer)
    document = Document(text.encode("utf-8", "replace").decode("utf-8"))  # a lone surrogate becomes "?"
    document.source = record["source"] if isinstance(record.get("source"), str) else ""
    return document


def _text_field(record: dict[str, Any], where: str) -> str:
    if "text" not in record:
        found = ", ".join(sorted(record)) or "none"
        raise DataError(f'has no field "text"; its fields are: {found}', where=where, fix=_FIELD)
    if not isinstance(record["text"], str):
        raise DataError(
            f'the field "text" holds {type(record["text"]).__name__}, not a string', where=where, fix=_FIELD
        )
    return record["text"]


def _rendered(record: dict[str, Any], field: str, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A chat as the model's own template writes it; without the BOS token, which windows get where it belongs."""
    messages = [_message(message, field, where) for message in record[field]] if _is_list(record[field]) else []
    if not messages:
        raise DataError(f"{field!r} is not a list of messages", where=where, fix=_FIELD)
    if not getattr(tokenizer, "chat_template", None):
        fix = 'give a model whose tokenizer has one, or records with "text"'
        raise DataError("is a chat, and the tokenizer has no chat template to render it", where=where, fix=fix)
    assert tokenizer is not None
    tools = record.get("tools")
    try:
        rendered = tokenizer.apply_chat_template(messages, tools=tools if _is_list(tools) else None, tokenize=False)
    except Exception as error:  # what templates refuse, they raise in many kinds
        fix = "change the record, such as the order of its roles"
        raise DataError(f"the chat template refuses it ({_reason(error)})", where=where, fix=fix) from None
    return str(rendered).removeprefix(tokenizer.bos_token if start_token(tokenizer) is not None else "")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _message(message: Any, field: str, where: str) -> dict[str, Any]:
    """A message of a chat as templates read it: `role` and `content`."""
    if isinstance(message, dict):
        if isinstance(message.get("role"), str):
            return {name: value for name, value in message.items() if value is not None or name == "content"}
        if isinstance(message.get("from"), str) and isinstance(message.get("value"), str):
            role = message["from"]
            return {"role": _ROLES.get(role, role), "content": message["value"]}
    fix = 'write messages as {"role": "user", "content": "..."}'
    raise DataError(f"{field!r} holds something that is no message", where=where, fix=fix)


def _load_dataset(*args: Any, **kwargs: Any) -> Iterable[Any]:
    """The rows of a dataset, as they come."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs it raises, too: one message is enough
    rows: Iterable[Any] = datasets.load_dataset(*args, **kwargs, streaming=True)
    return rows


def _read_parquet(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    try:
        rows = _load_dataset("parquet", data_files=str(path), split="train")
        for number, row in enumerate(rows, 1):
            yield _text_of(row, f"{path}, row {number}", tokenizer)
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(
            f"is not a readable parquet file ({_reason(error)})", where=path, fix="write the file again"
        ) from None


def _read_saved(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """A folder that `save_to_disk` wrote; of a DatasetDict the split `train`, or the only one."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            split = "train" if "train" in saved else min(saved) if len(saved) == 1 else None
            if split is None:
                fix = f"give the folder of one of them: {', '.join(sorted(saved))}"
                raise DataError("holds several splits, none of them train", where=folder, fix=fix)
            saved = saved[split]
        for number, row in enumerate(saved, 1):
            yield _text_of(row, f"{folder}, row {number}", tokenizer)
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(
            f"is not a readable folder of save_to_disk ({_reason(error)})", where=folder, fix="write it again"
        ) from None


def _read_hub(
    data: str, name: str, config: str | None, split: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    try:
        _ask_hub(name)
        rows = _load_dataset(name, config, split=split)
        for number, row in enumerate(rows, 1):
            yield _text_of(row, f"{data}, row {number}", tokenizer)
    except DataError:
        raise
    except Exception as error:  # the hub, the network, and datasets raise many kinds
        raise DataError(
            f"neither a local file nor a dataset that the hub gives ({_reason(error)})",
            where=data,
            fix="check the path, or the id as org/name/config:split; HF_HUB_OFFLINE=1 forbids downloads",
        ) from None


def _ask_hub(name: str) -> None:
    """Raise what the hub says of a dataset that it does not give: `datasets` tries again for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with suppress(OfflineModeIsEnabled):  # `datasets` looks into its cache, and does not wait
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token where the tokenizer puts it before every text by default, as the model was trained; else None."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("text", verbose=False).input_ids
    plain = tokenizer("text", add_special_tokens=False, verbose=False).input_ids
    return bos if bos is not None and ids[:1] == [bos] and plain[:1] != [bos] else None
