"""The endless, resumable stream of training batches."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from headfuse.config.values import mixture_name, parse_data
from headfuse.errors import ConfigError, DataError
from headfuse.text.bos import start_token
from headfuse.text.documents import not_empty, open_document, read_documents, shuffled
from headfuse.text.windows import cut, token_windows, with_start

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
SECTION_CHARACTERS = 16
"""Characters of a section, per token of a window."""
HELD_OUT_EVERY = 16
"""One in this many sections is held out, until the validation windows are full."""
VALIDATION_WINDOWS = 16


@dataclass
class Place:
    """How far a training stream has read one text: sections of an epoch, counted from 0, and tokens in all."""

    epoch: int = 0
    sections: int = 0
    tokens: int = 0
    digest: str = ""
    """SHA-256 of these sections, because a file of the same name may hold another text when a run is resumed."""


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
    single book can be divided. Sections are joined by EOS; windows go across their ends, and begin with BOS if
    `start_token` gives one. Each text is read again, shuffled anew, where it ends. No more of it is in memory than the
    shuffling buffer holds.

    Args:
        data: texts, each as `read_documents` takes it, with their shares of the tokens in any unit.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens in a window.
        seed: of the shuffling and of the choice of the held-out sections.
        validation: a text for the validation windows, read in its order; by default sections are held out.
        validation_windows: how many of them.
        whole: refuse documents with EOS in them, where EOS is taken for the end of a document.
    """

    def __init__(
        self,
        data: str | Mapping[str, float],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        seed: int,
        validation: str | None = None,
        validation_windows: int = VALIDATION_WINDOWS,
        whole: bool = False,
    ) -> None:
        self.data, self.tokenizer, self.sequence_length, self.seed = parse_data(data), tokenizer, sequence_length, seed
        self.held_out: set[str] = set()
        self._whole = whole
        self._start = start_token(tokenizer)
        self._room = sequence_length - (self._start is not None)
        documents = (
            self._hold_out() if validation is None else read_documents(validation, tokenizer=tokenizer, in_pieces=True)
        )
        self.validation = token_windows(documents, tokenizer, sequence_length, validation_windows, required=0)
        if not len(self.validation):
            logger.warning(
                "%s is too short to hold out a part: no validation figures", validation or mixture_name(self.data)
            )

    def batches(self, size: int, state: Mapping[str, Any] | None = None) -> Iterator[Batch]:
        """Batches of `size` windows, from the start or from where the batch with this state ended.

        Raises:
            ConfigError: where the text, or that of the validation, is not the one that this state is of.
        """
        import torch

        held_out = hashlib.sha256(self.validation.numpy().tobytes()).hexdigest()
        if state and state.get("validation", held_out) != held_out:
            raise _other_text("the text of the validation", mixture_name(self.data))
        places = [Place(**place) for place in state["places"]] if state else [Place() for _ in self.data]
        rest: list[int] = list(state["rest"]) if state else []
        streams = [self._tokens(name, place) for name, place in zip(self.data, places, strict=True)]
        needed = size * self._room
        while True:
            while len(rest) < needed:  # the text that is furthest behind its share
                shares = [place.tokens / weight for place, weight in zip(places, self.data.values(), strict=True)]
                rest += next(streams[shares.index(min(shares))])
            windows = with_start(torch.tensor(rest[:needed], dtype=torch.long).view(size, self._room), self._start)
            del rest[:needed]
            read = {"places": [asdict(place) for place in places], "rest": list(rest), "validation": held_out}
            yield Batch(windows, read)

    def _tokens(self, name: str, place: Place) -> Iterator[list[int]]:
        """Tokens of successive sections, each ending in EOS, from `place` on; `place` is updated."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            fix = "set eos_token in tokenizer_config.json"
            where = self.tokenizer.name_or_path
            raise DataError("the tokenizer has no EOS token to join documents with", where=where, fix=fix)
        while True:
            before = place.tokens if not place.sections else None
            digest, sections = hashlib.sha256(), self._sections(name, place.epoch)
            for section in islice(sections, place.sections):
                digest.update(section.encode())
            if place.sections and place.digest not in ("", digest.hexdigest()):
                raise _other_text("the text", name)
            for section in sections:
                digest.update(section.encode())
                place.sections, place.digest = place.sections + 1, digest.hexdigest()
                if section not in self.held_out:
                    ids = [*self.tokenizer(section, add_special_tokens=False, verbose=False).input_ids, eos]
                    if self._whole and eos in ids[:-1]:
                        fix = "leave packing at joined: turns of a chat would not see those before them"
                        raise DataError("documents hold the EOS token, and packing: separate", where=name, fix=fix)
                    place.tokens += len(ids)
                    yield ids
            if before is not None and place.tokens - before < self._room:
                fix = "give more text, or a smaller --sequence-length"
                raise DataError(f"does not fill one window of {self.sequence_length} tokens", where=name, fix=fix)
            place.epoch, place.sections, place.digest = place.epoch + 1, 0, ""

    def _hold_out(self) -> Iterator[str]:
        """The held-out sections, from each text by its share, as far as they are read."""
        streams = [
            islice(self._sections(name, "held out"), HELD_OUT_EVERY // 2, None, HELD_OUT_EVERY) for name in self.data
        ]
        for section in _interleave(streams, list(self.data.values())):
            self.held_out.add(section)
            yield section

    def _sections(self, name: str, epoch: int | str) -> Iterator[str]:
        limit = SECTION_CHARACTERS * self.sequence_length
        documents = not_empty(open_document(name, self.tokenizer, limit), name)
        return shuffled((section for document in documents for section in cut(document, limit)), f"{self.seed} {epoch}")


def _other_text(what: str, where: str) -> ConfigError:
    fix = "give --resume the text of that run, or start anew with --overwrite alone"
    return ConfigError(f"{what} is not that of the interrupted run", where=where, fix=fix)


def _interleave(streams: Sequence[Iterator[str]], weights: Sequence[float]) -> Iterator[str]:
    """Take items from the stream furthest behind its share of the characters, until all are empty."""
    live = dict.fromkeys(range(len(streams)), 0.0)
    while live:
        behind = min(live, key=lambda i: live[i])
        item = next(streams[behind], None)
        if item is None:
            del live[behind]
        else:
            live[behind] += len(item) / weights[behind]
            yield item
