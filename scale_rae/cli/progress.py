"""Progress bars on stderr: of loading and sampling, and of a scaling run. A pipe gets lines instead.

A bar is shown only while weights are read or images are drawn, so that it does not mix with the hub's download bars.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scale_rae.acceptance import ACCEPTED, DROPPED
from scale_rae.cli.app import say
from scale_rae.errors import counted, printable
from scale_rae.scaling.events import (
    Event,
    ImagesDrawn,
    Message,
    Planned,
    PromptFailed,
    PromptFinished,
    WorkerLoaded,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from torch import Tensor

    from scale_rae.adaptive import Drawn


LINE_EVERY = 30.0  # seconds, in a pipe


class TextBar:
    """A bar on stderr with a text beside it, from the first `update` to `stop`; if `timed`, with the time that is left."""

    def __init__(self, timed: bool = False) -> None:
        self._timed = timed
        self._shown: tuple[Progress, TaskID] | None = None

    def update(self, text: str, done: int, total: int) -> None:
        """Shows that `done` of `total` things are done."""
        if self._shown is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            what = TextColumn("{task.description}")
            columns = (
                (what, BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) if self._timed else (BarColumn(), what)
            )
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._shown = bar, bar.add_task(text, total=total)
            bar.start()
        bar, task = self._shown
        bar.update(task, completed=done, total=total, description=text)

    def print(self, text: str) -> bool:
        """Prints a line above the bar; False if no bar is shown."""
        if self._shown is None:
            return False
        self._shown[0].console.print(text, markup=False, highlight=False, soft_wrap=True)
        return True

    def stop(self) -> None:
        """Removes the bar, if there is one."""
        if self._shown is not None:
            self._shown[0].stop()
            self._shown = None


class Bars:
    """One progress bar, moved by callbacks of loading and sampling; and notes. With `quiet`, neither is shown."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._shown = quiet, sys.stderr.isatty() and not quiet
        if quiet:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the hub's library is imported
        self._bar = TextBar(timed=True)
        self._drawn_before = 0  # evaluations so far, times their images
        self._images = 0
        self._wanted = 0
        self._candidates: Counter[str] = Counter()  # of searches, by what became of them

    def note(self, text: str) -> None:
        """Prints a line on stderr."""
        if not self._quiet:
            say(text)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A context that shows a text with a spinner, while something takes time that cannot be measured."""
        if not self._shown:
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(text):
            yield

    def load(self, what: str, done: int, total: int) -> None:
        """Shows bytes of weights read: `progress` of `ScaleRAE.from_pretrained`."""
        if self._shown:
            self._bar.update(f"loading {what}", done, total)
            if done >= total:
                self.stop()

    def expect(self, images: int) -> None:
        """Sets how many images all calls of the sampler together draw."""
        self._images, self._drawn_before = images, 0

    def step(self, evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
        """Shows one more evaluation of a batch x [B, C, S, S]: the sampler's callback."""
        if self._shown:
            total = max(self._images, len(x)) * evaluations
            self._drawn_before += len(x)
            self._bar.update(f"drawing {counted(self._images, 'image')}", self._drawn_before, total)
            if self._drawn_before >= total:
                self.stop()

    def search(self, wanted: int) -> None:
        """Sets how many images all searches together are to find."""
        self._wanted = wanted

    def watch(self, drawn: Drawn) -> None:
        """Shows what became of candidates so far: `watch` of a search."""
        candidate = drawn.candidate
        state = candidate.fate or ("begun" if not candidate.looks else "looked at")
        self._candidates[state] += 1
        if self._shown:
            begun, dropped, accepted = (self._candidates[name] for name in ("begun", DROPPED, ACCEPTED))
            text = f"{counted(begun, 'candidate')} begun, {dropped} dropped, {accepted} accepted"
            self._bar.update(text, min(accepted, self._wanted), self._wanted)

    def stop(self) -> None:
        """Removes the bar, if there is one."""
        self._bar.stop()


class ScalingDisplay:
    """Listens to a scaling run: one bar for all workers on a terminal, a line per prompt in a pipe; all on stderr.

    A quiet display (of processes that were started together, all but the first) shows messages only.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._shown = quiet, sys.stderr.isatty()
        self._bar = TextBar()
        self._start: float | None = None
        self._todo = self._finished = self._images = self._total = 0

    def __call__(self, event: Event) -> None:
        if self._quiet:
            if isinstance(event, Message):
                self._line(event.text)
            return
        match event:
            case Planned():
                self._todo, self._total = event.todo, event.todo * event.images_per_prompt
                if event.finished:
                    self._line(f"{counted(event.finished, 'prompt')} done already, {self._todo} to do")
                if event.workers > 1:  # a single worker shows how its loading goes
                    self._update()
            case WorkerLoaded():
                self._start = self._start or time.monotonic()
                self._update()
            case ImagesDrawn():
                self._images += event.count
                self._update()
            case Message():
                self._line(event.text)
            case PromptFailed():
                self._finished += 1
                self._line(f"{event.index:05} failed: {event.error}")
                self._update()
            case PromptFinished():
                self._finished += 1
                self._update()
                if not self._shown:
                    text = f"{event.index:05} {event.prompt}: {event.yes} yes of {event.images}"
                    self._line(f"{text} [{self._state()}]")

    def _state(self) -> str:
        text = f"{self._finished}/{counted(self._todo, 'prompt')}"
        if self._start is None:
            return f"{text}, loading"
        seconds = time.monotonic() - self._start
        if self._images and seconds > 0:
            rate = self._images / seconds
            text += f", {rate:.2f} images/s, {duration((self._total - self._completed()) / rate)} left"
        return text

    def _completed(self) -> int:
        # Failed prompts, and prompts begun in earlier runs, draw fewer images than planned.
        return min(self._total, max(self._images, self._finished * (self._total // self._todo)))

    def _update(self) -> None:
        if self._shown and self._todo:
            self._bar.update(self._state(), self._completed(), self._total)

    def _line(self, text: str) -> None:
        if not self._bar.print(printable(" ".join(text.split("\n")))):
            say(text)

    def stop(self) -> None:
        """Removes the bar, if there is one."""
        self._bar.stop()


class CountingDisplay:
    """Shows counted progress and the time left on stderr: a bar on a terminal, lines in a pipe."""

    def __init__(self, what: str) -> None:
        self._what, self._shown = what, sys.stderr.isatty()
        self._bar = TextBar()
        self._start = self._line_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` things are done; the first call, with 0, starts the clock."""
        now = time.monotonic()
        if not done:
            self._start = self._line_at = now
        if not total:
            return
        text = f"{done}/{total} {self._what}"
        if done:
            rate = done / max(now - self._start, 1e-9)
            text += f", {rate:.3g} {self._what}/s, {duration((total - done) / rate)} left"
        if self._shown:
            self._bar.update(text, done, total)
            if done == total:
                self._bar.stop()
        elif done == total or now - self._line_at >= LINE_EVERY:
            self._line_at = now
            say(text)

    def stop(self) -> None:
        """Removes the bar, if there is one."""
        self._bar.stop()


def duration(seconds: float) -> str:
    """A time in words: "45 s", "12 min", "3.5 h"."""
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"
