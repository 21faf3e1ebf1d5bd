"""The queue of waiting work, and the choice of the next batch. The engine calls it under its lock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from PIL import Image
from torch import Tensor

from scale_rae import adaptive
from scale_rae.language import Reply
from scale_rae.prompt import TextStream
from scale_rae.serve.jobs import Job
from scale_rae.serve.turns import Turns

LADDER = (1, 2, 4, 8, 16, 32, 64, 128)  # batch sizes on a GPU, for each of which code is compiled and graphs captured


class Stage(Enum):
    """What a batch is for."""

    REPLY = "reply"
    DRAW = "draw"
    RANK = "rank"
    ADVANCE = "advance"  # candidates of searches are drawn up to the next look
    LOOK = "look"


@dataclass(eq=False)
class Task:
    """A job and how far it is."""

    job: Job
    stream: TextStream
    begun: bool = False  # being answered or drawn, at least in part: what a server that shuts down finishes
    left: bool = False  # the client has gone
    over: bool = False  # its outcome has been emitted, or nobody waits for one
    reply: Reply | None = None
    latents: list[Tensor] = field(default_factory=list)  # of the turns' images
    prompt_tokens: int = 0
    heard: int = 0  # tokens of the reply that have gone through `stream`
    text: str = ""
    drawn: dict[int, tuple[Tensor, Image.Image]] = field(default_factory=dict)  # latent and image by index
    search: adaptive.Search | None = None
    stages: Iterator[adaptive.Stage] = field(default_factory=lambda: iter(()))  # of the search, from now on
    stages_queued: int = 0
    pending: int = 0  # candidates that the stage queued last is still to be done with

    @property
    def dead(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.over or self.left or time.monotonic() >= self.job.deadline


@dataclass(frozen=True, eq=False)
class Tile:
    """One image to draw or, of a search, one candidate that a stage is to be done with."""

    task: Task
    index: int
    stage: adaptive.Stage | None = None
    candidate: adaptive.Drawn | None = None
    resumes: bool = False  # its search has had a batch before

    @property
    def kind(self) -> tuple[Stage, Any]:
        """What it is for, and what else must be equal in a batch."""
        job = self.task.job
        if self.stage is None:
            return Stage.DRAW, job.options
        if self.stage.stop is None:
            return Stage.LOOK, (job.reward, self.stage.t)
        return Stage.ADVANCE, (job.options, self.stage.stop)


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of batches: up to `most` images. `threads`: on the CPU each draws batches of its own; None on a GPU."""

    most: int
    threads: int | None = None

    @property
    def all(self) -> list[int]:
        """The sizes that are compiled on a GPU, ascending."""
        return [size for size in LADDER if size < self.most] + [self.most]

    def padded(self, count: int) -> int:
        """The size that a batch of `count` images is computed with."""
        return count if self.threads is not None else next(size for size in self.all if size >= count)

    def images(self, waiting: int) -> int:
        """How many of the images that wait make the next batch.

        On the CPU an equal share per thread; on a GPU one of `all`, or fewer that fill at least three quarters of one.
        """
        if self.threads is not None:
            return min(self.most, -(-waiting // self.threads))
        fits = max(size for size in self.all if size <= max(waiting, 1))
        above = next((size for size in self.all if size > waiting), fits)
        return waiting if waiting < self.most and 4 * waiting >= 3 * above else min(fits, self.most)

    @property
    def replies(self) -> int:
        """How many replies make a batch: on the CPU one, so that a reply has the same bits alone and in company."""
        return self.most if self.threads is None else 1


class Schedule:
    """Tasks that are waiting or under way (`tasks`), and the queue of each stage. Clients take turns."""

    def __init__(self) -> None:
        self.tasks: dict[Job, Task] = {}
        self._replies: deque[Task] = deque()
        self._tiles: deque[Tile] = deque()
        self._rankings: deque[Task] = deque()
        self._turns = Turns()
        self._replies_first = 0  # replies that were waiting when the last batch of images was taken
        self._answered = 0  # replies since then
        self._resumed: set[str] = set()  # clients whose last batch of tiles went on with a search

    def add(self, task: Task) -> None:
        """Queues a new task for its reply."""
        self.tasks[task.job] = task
        self._replies.append(task)

    def add_images(self, task: Task) -> None:
        """Queues the images of a task that has its reply."""
        self._tiles.extend(Tile(task, i) for i in range(task.job.best_of))

    def add_stage(self, task: Task, stage: adaptive.Stage) -> None:
        """Queues what a task's search needs next."""
        resumes = task.stages_queued > 0
        task.stages_queued += 1
        task.pending = len(stage.going)
        self._tiles.extend(Tile(task, d.candidate.number, stage, d, resumes) for d in stage.going)

    def add_ranking(self, task: Task) -> None:
        """Queues a task whose images are drawn."""
        self._rankings.append(task)

    def remove(self, task: Task) -> None:
        """Takes a task out of everything."""
        task.over = True
        self.tasks.pop(task.job, None)
        if task in self._replies:
            self._replies.remove(task)
        if task in self._rankings:
            self._rankings.remove(task)
        self._tiles = deque(tile for tile in self._tiles if tile.task is not task)

    @property
    def waiting_to_draw(self) -> int:
        """How many tasks have their reply but none of their images under way."""
        return len({tile.task for tile in list(self._tiles) if not tile.task.begun})

    @property
    def has_work(self) -> bool:
        """Whether anything waits for a batch."""
        return bool(self._rankings or self._replies or self._tiles)

    def next(self, sizes: BatchSizes) -> tuple[Stage, list[Any]]:
        """The next batch: its stage, and its tasks or tiles. There must be work.

        A client's searches that go on and its images that have not begun take turns, so neither wait for all of the others.
        """
        if self._rankings:
            return Stage.RANK, [self._rankings.popleft()]
        if self._is_reply_next(sizes):
            tasks = self._turns.order(self._replies, lambda task: task.job.client)[: sizes.replies]
            for task in tasks:
                self._replies.remove(task)
            self._answered += len(tasks)
            self._begin(tasks)
            return Stage.REPLY, tasks
        tiles = sorted(self._tiles, key=lambda tile: tile.resumes == (tile.task.job.client in self._resumed))
        waiting = self._turns.order(tiles, lambda tile: tile.task.job.client)
        kind = waiting[0].kind
        alike = [tile for tile in waiting if tile.kind == kind]
        chosen = alike[: sizes.images(len(alike))]
        taken = set(chosen)
        self._resumed -= {tile.task.job.client for tile in chosen}
        self._resumed |= {tile.task.job.client for tile in chosen if tile.resumes}
        self._tiles = deque(tile for tile in self._tiles if tile not in taken)
        self._replies_first, self._answered = len(self._replies), 0
        self._begin([tile.task for tile in chosen])
        return kind[0], chosen

    def _is_reply_next(self, sizes: BatchSizes) -> bool:
        """Whether the next batch is of replies, not of images.

        The replies that waited when the last batch of images was taken come before the next such batch. With several
        clients the two kinds take turns as their clients do, and a client's own replies come first only as long as its
        images do not fill the next batches.
        """
        if not self._replies or not self._tiles:
            return bool(self._replies)
        is_due = self._answered < self._replies_first
        if len({job.client for job in self.tasks}) == 1:
            return is_due
        reply = self._turns.order(self._replies, lambda task: task.job.client)[0].job.client
        tile = self._turns.order(self._tiles, lambda tile: tile.task.job.client)[0].task.job.client
        if reply != tile:
            return self._turns.last(reply) < self._turns.last(tile)
        return is_due and len(self._tiles) < sizes.most * (sizes.threads or 1)

    def _begin(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            task.begun = True
        self._turns.serve(dict.fromkeys(task.job.client for task in tasks))
        clients = {job.client for job in self.tasks}
        self._turns.keep(clients)
        self._resumed &= clients
