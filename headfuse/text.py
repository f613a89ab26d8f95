"""Text: documents, and the token windows that calibration, uptraining and evaluation read."""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headfuse.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_DATA = "default"
"""The text that ships inside the package: generic prose."""

_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
_FIELD = 'each record needs its text in a field "text", like {"text": "..."}'

_SHUFFLED_DOCUMENTS = 10_000
_SHUFFLED_CHARACTERS = 2**26
_TOKENISED_CHARACTERS = 2**21

_SECTION_CHARACTERS = 16
"""Characters of a section for each token of a window."""
_HELD_OUT = 16
"""One in so many sections is held out, until they fill the validation windows."""
_VALIDATION_WINDOWS = 16


# ---------------------------------------------------------------- documents


class Document(str):
    """A text, and the record's field `source`, which names its domain; empty where there is none."""

    __slots__ = ("source",)
    source: str


def read_documents(data: str, *, seed: int | None = None) -> Iterator[str]:
    """Read documents one by one; empty ones are left out.

    Args:
        data: `default` (the packaged text), a .txt file (one document, nothing stripped), a .jsonl, .json or .parquet
            file whose records have a field `text` (JSON: one record a line), a folder of such files, or a dataset of
            the Hugging Face hub as `org/name`, `org/name:split` or `org/name/config:split` (split `train` by default).
        seed: shuffle the documents (through a buffer, see `shuffled`); None keeps their order.

    Raises:
        DataError: at once when there is no such data, while reading when it cannot be understood or holds no text.
    """
    documents = _not_empty(_open(data), data)
    return documents if seed is None else shuffled(documents, seed)


def data_name(data: str) -> str:
    """How an output may name the data: a hub id, or a file's name without its folders."""
    return Path(data).name if Path(data).exists() else data


def parse_data(data: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Texts with their weights from `NAME` or `NAME=WEIGHT`; without a weight it is 1.

    Raises:
        DataError: for a weight that is no number above 0, and a text that is there twice.
    """
    if isinstance(data, Mapping):
        pairs = [(name, float(weight)) for name, weight in data.items()]
    else:
        pairs = list[tuple[str, float]]()
        for entry in [data] if isinstance(data, str) else data:
            name, equals, weight = entry.rpartition("=")
            weighted = bool(equals) and not Path(entry).exists() and re.fullmatch(r"[-+.\deE]+|nan|inf", weight)
            try:
                pairs.append((name, float(weight)) if weighted else (entry, 1.0))
            except ValueError:
                pairs.append((name, math.nan))
    if not pairs:
        raise DataError("no text is given", where="--data", fix="give a text file, a folder or a hub dataset")
    for text, share in pairs:
        if not 0 < share < math.inf:
            raise DataError(f"the weight of a text is {share}", where=text, fix="give a number above 0, like 0.7")
    if len(dict(pairs)) < len(pairs):
        raise DataError("a text is given twice", where="--data", fix="give each text once, with its weight")
    return dict(pairs)


def mixture_name(data: Mapping[str, float]) -> str:
    """How an output may name texts and their weights."""
    if len(data) == 1:
        return data_name(next(iter(data)))
    return ", ".join(f"{data_name(name)}={weight:g}" for name, weight in data.items())


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


def _open(data: str, piece: int | None = None) -> Iterator[str]:
    """Documents; with `piece`, a .txt file comes in pieces of so many characters, never whole."""
    path = Path(data)
    if not data:  # Path("") would be the working directory: an unset variable of a script
        raise DataError("the name of the text is empty", where="--data", fix="give a text file, or leave it out")
    if data == DEFAULT_DATA:
        return _packaged()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in _SUFFIXES and file.is_file()]
        if not files:
            raise DataError(
                f"the folder holds no {_listed(_SUFFIXES)} file", where=data, fix="give a folder with text in it"
            )
        return (document for file in files for document in _read_file(file, piece))
    if path.exists():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"is not a {_listed(_SUFFIXES)} file", where=data, fix="rename or convert it")
        return _read_file(path, piece)
    match = _HUB_ID.fullmatch(data)
    if match is None or path.suffix in _SUFFIXES:
        raise DataError(
            "no such file", where=data, fix="give a text file, a folder, a hub dataset like org/name, or `default`"
        )
    return _read_hub(data, match["name"], match["config"], match["split"] or "train")


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"


def _not_empty(documents: Iterable[str], data: str) -> Iterator[str]:
    empty = True
    for document in documents:
        if document:
            empty = False
            yield document
    if empty:
        raise DataError("holds no text", where=data, fix="give data with text in it")


def _packaged() -> Iterator[str]:
    text = (resources.files("headfuse") / "data" / "default.txt").read_text(encoding="utf-8")
    yield from text.split("\f")


def _read_file(path: Path, piece: int | None) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        if path.suffix == ".txt" and piece is not None:
            yield from _read_pieces(path, piece)
            return
        with path.open("rb") as stream:
            if path.suffix == ".txt":
                yield _decoded(stream.read(), str(path))
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _json_text(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path, fix="check its permissions") from None


def _read_pieces(path: Path, limit: int) -> Iterator[str]:
    rest = ""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            while block := stream.read(64 * limit):
                *pieces, rest = cut(rest + block, limit)
                yield from pieces
    except UnicodeDecodeError:
        _decoded(path.read_bytes(), str(path))  # the message tells the place in the file
    yield rest


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8 text (byte {error.start})", where=where, fix="convert the file to UTF-8"
        ) from None


def _json_text(line: bytes, where: str) -> str:
    try:
        record = json.loads(_decoded(line, where).removeprefix("\ufeff"))
    except (json.JSONDecodeError, RecursionError) as error:
        fix = "write one JSON object a line, not an array or an object over several lines"
        raise DataError(f"is not valid JSON: {error}", where=where, fix=fix) from None
    return _text_field(record, where)


def _text_field(record: Any, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError("is not a JSON object", where=where, fix=_FIELD)
    if "text" not in record:
        found = ", ".join(sorted(record)) or "none"
        raise DataError(f'has no field "text"; its fields are: {found}', where=where, fix=_FIELD)
    if not isinstance(record["text"], str):
        raise DataError(
            f'the field "text" holds {type(record["text"]).__name__}, not a string', where=where, fix=_FIELD
        )
    document = Document(record["text"].encode("utf-8", "replace").decode("utf-8"))  # a lone surrogate becomes "?"
    document.source = record["source"] if isinstance(record.get("source"), str) else ""
    return document


def _load_dataset(*args: Any, **kwargs: Any) -> Iterable[Any]:
    """The rows of a dataset, as they come."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs it raises, too: one message is enough
    rows: Iterable[Any] = datasets.load_dataset(*args, **kwargs, streaming=True)
    return rows


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        rows = _load_dataset("parquet", data_files=str(path), split="train")
        for number, row in enumerate(rows, 1):
            yield _text_field(row, f"{path}, row {number}")
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(
            f"is not a readable parquet file ({_reason(error)})", where=path, fix="write the file again"
        ) from None


def _read_hub(data: str, name: str, config: str | None, split: str) -> Iterator[str]:
    try:
        rows = _load_dataset(name, config, split=split)
        for number, row in enumerate(rows, 1):
            yield _text_field(row, f"{data}, row {number}")
    except DataError:
        raise
    except Exception as error:  # the hub, the network, and datasets raise many kinds
        raise DataError(
            f"neither a local file nor a dataset that the hub gives ({_reason(error)})",
            where=data,
            fix="check the path, or the id as org/name/config:split; HF_HUB_OFFLINE=1 forbids downloads",
        ) from None


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# ---------------------------------------------------------------- token windows


def iter_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> Iterator[torch.Tensor]:
    """Pack documents, joined by EOS, into windows `[sequence_length]`, in order.

    An incomplete last window is dropped. No BOS and no other special token is added. A single document needs no EOS.
    """
    rest: list[int] = []
    for ids in _token_lists(documents, tokenizer):
        rest += ids
        full = len(rest) // sequence_length * sequence_length
        yield from torch.tensor(rest[:full], dtype=torch.long).view(-1, sequence_length)
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
    return _first_windows(_token_lists(documents, tokenizer), sequence_length, num_windows, required, where)


def _first_windows(
    tokens: Iterable[list[int]], sequence_length: int, num_windows: int | None, required: int, where: str | None
) -> torch.Tensor:
    """Token ids in a row, cut into windows."""
    ids: list[int] = []
    wanted = None if num_windows is None else num_windows * sequence_length
    for more in tokens:
        ids += more
        if wanted is not None and len(ids) >= wanted:
            break
    found = len(ids) // sequence_length if num_windows is None else min(len(ids) // sequence_length, num_windows)
    if found < required:
        raise DataError(
            f"holds {len(ids):,} tokens; {required * sequence_length:,} are needed"
            f" for {required} window{'s' * (required > 1)} of {sequence_length} tokens",
            where=where,
            fix="give more text, or a smaller --sequence-length",
        )
    return torch.tensor(ids[: found * sequence_length], dtype=torch.long).view(found, sequence_length)


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
    """Windows as of `token_windows` out of as many documents as they can hold: long ones would fill many of them.

    A document gives one piece of at most a window, from a place that the seed draws; where that does not suffice,
    pieces of what is left of the documents follow. Every piece ends in EOS. What is learnt on varied text carries over
    to other text (docs/experiments.md). The other arguments, the result `[windows, sequence_length]` and the errors are
    those of `token_windows`.
    """
    tokens = _pieces(documents, tokenizer, sequence_length, random.Random(seed))
    return _first_windows(tokens, sequence_length, num_windows, required, where)


def _pieces(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, draw: random.Random
) -> Iterator[list[int]]:
    """Token ids with EOS at their end, at most `length` together: a piece of every document, then the other pieces."""
    end, rests = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], list[list[int]]()
    size = length - len(end)
    for ids in _token_lists(documents, tokenizer):
        if ids and ids != end:
            start = draw.randrange(max(1, len(ids) - size + 1))
            yield ids[start : start + size] + end
            for rest in ids[:start], ids[start + size :]:
                rests += [rest[first : first + size] for first in range(0, len(rest), size)]
    draw.shuffle(rests)
    yield from (rest + end for rest in rests)


def labelled_tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """The first `limit` tokens of documents joined by EOS, as in `token_windows`, and where each comes from.

    Returns:
        Token ids `[tokens]`, the index of each token's `Document.source` `[tokens]`, and these sources.
    """
    ids, places, names = list[int](), list[int](), dict[str, int]()
    current = ""

    def noted() -> Iterator[str]:
        nonlocal current
        for document in documents:
            current = document.source if isinstance(document, Document) else ""
            yield document

    for more in _token_lists(noted(), tokenizer):
        ids += more
        places += [names.setdefault(current, len(names))] * len(more)
        if len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.long), torch.tensor(places[:limit], dtype=torch.long), list(names)


def _token_lists(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids, document by document, EOS between two; a long one is tokenised in pieces cut at line ends."""
    for number, document in enumerate(documents):
        if number:
            if tokenizer.eos_token_id is None:
                fix = "give one .txt file, or set eos_token in tokenizer_config.json"
                where = tokenizer.name_or_path
                raise DataError("the tokenizer has no EOS token to join documents with", where=where, fix=fix)
            yield [tokenizer.eos_token_id]
        for piece in cut(document, _TOKENISED_CHARACTERS):
            yield tokenizer(piece, add_special_tokens=False, verbose=False).input_ids


@dataclass
class Place:
    """How far a training stream has read one text: sections of an epoch, counted from 0, and tokens in all."""

    epoch: int = 0
    sections: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Batch:
    """Windows `[n, sequence_length]`, and the state from which the windows after them follow."""

    windows: torch.Tensor
    state: dict[str, Any]

    @property
    def epochs(self) -> int:
        """Epochs that the text read most often has begun."""
        return 1 + max(place["epoch"] for place in self.state["places"])


class TrainingText:
    """Training windows without end, and the validation windows of the sections that are held out from them.

    A section is a document, or a piece of a long one (some four windows), so that a step sees several texts and a
    single book can be divided. Sections are joined by EOS; windows go across their ends. Each text is read again,
    shuffled anew, where it ends. No more of it is in memory than the shuffling buffer holds.

    Args:
        data: texts, each as `read_documents` takes it, with their shares of the tokens in any unit.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens in a window.
        seed: of the shuffling and of the choice of the held-out sections.
        validation: a text for the validation windows, read in its order; by default sections are held out.
        validation_windows: how many of them.
    """

    def __init__(
        self,
        data: str | Mapping[str, float],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        seed: int,
        validation: str | None = None,
        validation_windows: int = _VALIDATION_WINDOWS,
    ) -> None:
        self.data, self.tokenizer, self.sequence_length, self.seed = parse_data(data), tokenizer, sequence_length, seed
        self.held_out: set[str] = set()
        documents = self._hold_out() if validation is None else read_documents(validation)
        self.validation = token_windows(documents, tokenizer, sequence_length, validation_windows, required=0)
        if not len(self.validation):
            logger.warning("%s is too short to hold some of it out: no figures", validation or mixture_name(self.data))

    def batches(self, size: int, state: Mapping[str, Any] | None = None) -> Iterator[Batch]:
        """Batches of `size` windows, from the start or from where the batch with this state ended."""
        places = [Place(**place) for place in state["places"]] if state else [Place() for _ in self.data]
        rest: list[int] = list(state["rest"]) if state else []
        streams = [self._tokens(name, place) for name, place in zip(self.data, places, strict=True)]
        needed = size * self.sequence_length
        while True:
            while len(rest) < needed:  # the text that is furthest behind its share
                shares = [place.tokens / weight for place, weight in zip(places, self.data.values(), strict=True)]
                rest += next(streams[shares.index(min(shares))])
            windows = torch.tensor(rest[:needed], dtype=torch.long).view(size, self.sequence_length)
            del rest[:needed]
            yield Batch(windows, {"places": [asdict(place) for place in places], "rest": list(rest)})

    def _tokens(self, name: str, place: Place) -> Iterator[list[int]]:
        """Tokens of section after section, each with EOS at its end; `place` says from where on, and is kept up."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            fix = "set eos_token in tokenizer_config.json"
            where = self.tokenizer.name_or_path
            raise DataError("the tokenizer has no EOS token to join documents with", where=where, fix=fix)
        while True:
            before = place.tokens if not place.sections else None
            for section in islice(self._sections(name, place.epoch), place.sections, None):
                place.sections += 1
                if section not in self.held_out:
                    ids = [*self.tokenizer(section, add_special_tokens=False, verbose=False).input_ids, eos]
                    place.tokens += len(ids)
                    yield ids
            if before is not None and place.tokens - before < self.sequence_length:
                fix = "give more text, or a smaller --sequence-length"
                raise DataError(f"does not fill one window of {self.sequence_length} tokens", where=name, fix=fix)
            place.epoch, place.sections = place.epoch + 1, 0

    def _hold_out(self) -> Iterator[str]:
        """The held-out sections, from each text by its share, as far as they are read."""
        streams = [islice(self._sections(name, "held out"), _HELD_OUT // 2, None, _HELD_OUT) for name in self.data]
        for section in _interleave(streams, list(self.data.values())):
            self.held_out.add(section)
            yield section

    def _sections(self, name: str, epoch: int | str) -> Iterator[str]:
        limit = _SECTION_CHARACTERS * self.sequence_length
        documents = _not_empty(_open(name, limit), name)
        return shuffled((section for document in documents for section in cut(document, limit)), f"{self.seed} {epoch}")


def _interleave(streams: Sequence[Iterator[str]], weights: Sequence[float]) -> Iterator[str]:
    """From the stream that is furthest behind its share of the characters, until all are empty."""
    live = dict.fromkeys(range(len(streams)), 0.0)
    while live:
        behind = min(live, key=lambda i: live[i])
        item = next(streams[behind], None)
        if item is None:
            del live[behind]
        else:
            live[behind] += len(item) / weights[behind]
            yield item
