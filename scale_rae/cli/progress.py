"""Progress bars on a terminal, none in a pipe. All on stderr, and gone when done.

A bar is up only while weights are read or images drawn: in between, the hub's own download bars have the terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor


class Bars:
    """Callbacks for loading and sampling, and the bar they move."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: Any = None
        self._drawn_before = 0  # image evaluations of earlier calls to `draw`
        self._images = 0

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A sign of life while something goes on that cannot be counted."""
        if not self._shown:
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(text):
            yield

    def load(self, what: str, done: int, total: int) -> None:
        """`ScaleRAE.from_pretrained`'s progress: bytes of weights."""
        if self._shown:
            self._update(f"loading {what}", done, total)
            if done >= total:
                self.stop()

    def expect(self, images: int) -> None:
        """How many images all calls of the sampler together draw."""
        self._images, self._drawn_before = images, 0

    def step(self, evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
        """The sampler's callback: one evaluation of a batch x [B, C, S, S]."""
        if self._shown:
            total = max(self._images, len(x)) * evaluations
            images = f"{self._images} images" if self._images > 1 else "1 image"
            self._drawn_before += len(x)
            self._update(f"drawing {images}", self._drawn_before, total)
            if self._drawn_before >= total:
                self.stop()

    def _update(self, text: str, done: int, total: int) -> None:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(text, total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        """Takes the bar away, if there is one."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
