"""Runs work on a thread of its own, as a generator of what it emits; closing the generator stops the work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

from scale_rae.errors import ScaleRAEError

T = TypeVar("T")
R = TypeVar("R")
U = TypeVar("U")


class Stopped(Exception):
    """The visitor has gone; ends the work."""


class Emitter(Generic[T]):
    """What work gives its values to: `emit(value)`. Once `stop` has been called, `emit` and `check` raise Stopped."""

    def __init__(self) -> None:
        self.values: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends the work at its next `emit` or `check`."""
        self._stopped.set()

    def check(self) -> None:
        """Raises Stopped when the work is to end."""
        if self._stopped.is_set():
            raise Stopped

    def __call__(self, value: T) -> None:
        self.check()
        self.values.put(value)

    def end(self) -> None:
        """Marks that no value follows."""
        self.values.put(_End())


class _End: ...


def mapped(steps: Generator[T, None, R], show: Callable[[T], U]) -> Generator[U, None, R]:
    """Yields `show` of each value of a generator, and returns what the generator returns."""
    while True:
        try:
            value = next(steps)
        except StopIteration as stop:
            return stop.value
        yield show(value)


def streamed(work: Callable[[Emitter[T]], R]) -> Generator[T, None, R]:
    """Yields what `work` emits on a thread of its own, and returns what it returns or raises what it raises.

    When the generator is closed early, the next `emit` or `emit.check()` of the work raises.
    """
    emit: Emitter[T] = Emitter()
    result: list[R] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work(emit))
        except BaseException as e:  # raised again in the thread that waits
            error.append(e)
        finally:
            emit.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while not isinstance(value := emit.values.get(), _End):
            yield value
    finally:
        emit.stop()
    thread.join()
    if error and isinstance(error[0], Stopped):  # ended by someone else than the generator's user
        raise ScaleRAEError("The page is ending.")
    if error:
        raise error[0]
    return result[0]
