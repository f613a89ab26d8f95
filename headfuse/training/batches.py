"""Batches of text for all processes of a run: read ahead in a thread of the first one, and sent to the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from headfuse.errors import HeadfuseError
from headfuse.text.stream import Batch


@contextlib.contextmanager
def shared_batches(accelerator: Accelerator, batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """The first process's batches, or its error, in every process: the others neither read nor tokenise text."""
    with read_ahead(batches) as ahead:
        yield _sent(accelerator, ahead)


def _sent(accelerator: Accelerator, batches: Iterator[Batch]) -> Iterator[Batch]:
    while True:
        held: list[Batch | HeadfuseError | None] = [None]
        if accelerator.is_main_process:
            try:
                held = [next(batches)]
            except HeadfuseError as error:
                held = [error]
        broadcast_object_list(held)
        if isinstance(held[0], HeadfuseError):
            raise held[0]
        assert held[0] is not None
        yield held[0]


@contextlib.contextmanager
def read_ahead(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """The same batches, the next one read and tokenised in a thread while a step is computed."""
    with ThreadPoolExecutor(1) as worker:

        def generate() -> Iterator[Batch]:
            future = worker.submit(next, batches)
            while True:
                batch = future.result()
                future = worker.submit(next, batches)
                yield batch

        yield generate()
