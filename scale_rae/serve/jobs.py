"""Job, Result and Inbox: what a route gives the engine, what it gets back, and the way between their threads."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from scale_rae.adaptive import Searcher
from scale_rae.noise import image_seed
from scale_rae.options import SamplingOptions
from scale_rae.prompt import SYSTEM, Turn


@dataclass(frozen=True)
class ResultImage:
    """The file of one drawn image, the seed of its noise and, if only the best were wanted, its scores."""

    file: bytes
    seed: int
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of a job. `cut_off`: the answer ends because its limit of tokens was reached."""

    text: str
    images: list[ResultImage]
    prompt_tokens: int
    new_tokens: int
    cut_off: bool
    search: dict[str, Any] | None = None  # what a search took: `candidates`, `dropped`, `accepted`, `evaluations`


Event = str | Result | BaseException


@dataclass(frozen=True, eq=False)
class Job:
    """What a request asks of the model.

    `emit` is called from the engine's threads: with the text of an answer, piece by piece as it is written, and at the end
    once with a Result or an exception.
    """

    turns: Sequence[Turn]
    pixels: Tensor | None  # of the turns' images, preprocessed, [N, 3, H, W]
    options: SamplingOptions
    seed: int
    emit: Callable[[Event], None]
    deadline: float  # on time.monotonic's clock
    count: int = 1  # images to return
    best_of: int = 1  # images to draw, unless they are searched
    searcher: Searcher | None = None  # draws candidates until `count` are accepted
    reward: str | None = None  # what ranks the images: a reward's name or OWN_JUDGEMENT; None where all are returned
    subject: str = ""  # what the images are ranked against
    system: str = SYSTEM
    max_new_tokens: int = 512
    draws: bool = True  # whether a reply that asks for an image gets it
    must_draw: bool = False  # whether a reply that asks for none is an error
    text_field: str = "prompt"  # the request's field with the text, which errors about its length name
    client: str = ""  # whom the job counts for when clients take turns
    form: str = "png"  # of the images' files, and their quality
    quality: int = 100
    streams: bool = False  # whether the client gets text as it is written, after which the job cannot be refused

    def seed_of(self, index: int) -> int:
        """The noise seed of the job's image `index`, the one that `t2i --seed` gives it."""
        return image_seed(self.seed, 0, index)


class Inbox:
    """What a job emits, on its way from the engine's threads to the event loop in which this is made.

    `deadline`, on time.monotonic's clock, is `seconds` from now.
    """

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Adds an event; for any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self, patience: float | None = None) -> str | Result | None:
        """The next event, or None after `patience` seconds.

        Raises:
            Exception: the one that ended the job.
        """
        try:
            async with asyncio.timeout(patience):
                event = await self._queue.get()
        except TimeoutError:
            return None
        if isinstance(event, BaseException):
            raise event
        return event
