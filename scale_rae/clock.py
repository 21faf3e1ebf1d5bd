"""Seconds per stage of a run."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class StageClock:
    """Seconds per stage of the work, summed over threads."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time spent in a `with` to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """The seconds so far, by stage."""
        with self._lock:
            return dict(self._seconds)
