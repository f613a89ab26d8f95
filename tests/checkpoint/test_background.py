"""What a thread reads and writes: in order, with its errors where the work is."""

from __future__ import annotations

import threading

import pytest

from headfuse.checkpoint.background import InTurn, ReadAhead


@pytest.mark.parametrize("ahead", [False, True])
def test_every_item_is_read_once_and_in_order(ahead: bool) -> None:
    asked = list[int]()

    def read(index: int) -> int:
        asked.append(index)
        return 10 * index

    reader = ReadAhead(read, 3, ahead)
    assert [reader(0), reader(1), reader(2)] == [0, 10, 20]
    assert asked == [0, 1, 2]
    assert reader(1) == 10  # from the middle, after the end


def test_the_next_item_is_read_meanwhile() -> None:
    read = {index: threading.Event() for index in range(2)}
    reader = ReadAhead(lambda index: read[index].set(), 2, ahead=True)
    reader(0)
    assert read[1].wait(10)


def test_an_error_of_reading_ahead_comes_with_its_item() -> None:
    def read(index: int) -> int:
        if index:
            raise ValueError("damaged")
        return index

    reader = ReadAhead(read, 2, ahead=True)
    assert reader(0) == 0
    with pytest.raises(ValueError, match="damaged"):
        reader(1)


@pytest.mark.parametrize("thread", [False, True])
def test_work_is_done_in_turn_and_before_the_end(thread: bool) -> None:
    done = list[int]()
    with InTurn(thread) as work:
        for index in range(3):
            work(lambda index=index: done.append(index))  # type: ignore[misc]
    assert done == [0, 1, 2]


def test_an_error_of_writing_ends_the_block() -> None:
    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), InTurn(thread=True) as work:
        work(fail)
