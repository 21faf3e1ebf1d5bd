"""Waves are stored in a thread while the next ones are drawn: in their order, and none after one that failed."""

from __future__ import annotations

import threading

import pytest

from scale_rae.errors import OutputError
from scale_rae.scaling.waves import Writes


def test_in_their_order_beside_what_goes_on() -> None:
    counted: list[tuple[int, int]] = []
    written: list[int] = []
    may_write = threading.Event()
    with Writes(lambda images: counted.append((images, threading.get_ident()))) as writes:
        writes.add(lambda: (may_write.wait(240), written.append(0))[1], 3)
        writes.add(lambda: written.append(1), 4)
        writes.settle()
        assert written == counted == []  # nothing waits for the first one
        may_write.set()
    assert written == [0, 1]
    assert counted == [(3, threading.get_ident()), (4, threading.get_ident())]


def test_none_after_one_that_failed() -> None:
    counted: list[int] = []
    written: list[int] = []

    def fail() -> None:
        raise OutputError("the disk is full")

    def store() -> None:
        with Writes(counted.append) as writes:
            for write in (lambda: written.append(0), fail, lambda: written.append(2)):
                writes.add(write, 1)

    with pytest.raises(OutputError, match="the disk is full"):
        store()
    assert written == [0]
    assert counted == [1]


def test_an_error_while_drawing_is_the_one_that_is_raised() -> None:
    written: list[int] = []

    def store() -> None:
        with Writes(lambda images: None) as writes:
            writes.add(lambda: written.append(0), 1)
            raise ValueError("drawing")

    with pytest.raises(ValueError, match="drawing"):
        store()
    assert written in ([], [0])  # it may have begun
