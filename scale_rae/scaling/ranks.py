"""Launcher: processes that torchrun or SLURM started, each of them one worker.

They share prompts by the folder's locks.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scale_rae.errors import InputError
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.events import (
    Event,
    ImagesDrawn,
    Listener,
    Message,
    PromptFailed,
    PromptFinished,
    WorkerLoaded,
)
from scale_rae.scaling.launch import Job, share
from scale_rae.scaling.local import check_here
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Assignment, work

if TYPE_CHECKING:
    from scale_rae.opening import LoadingBar

LOOK = 1.0  # seconds between looks at the folder that the processes share


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place among those that torchrun, SLURM, … started; alone by default."""

    index: int = 0
    size: int = 1
    local_index: int = 0  # on this machine

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ProcessGroup:
        """From RANK, WORLD_SIZE and LOCAL_RANK, or those of SLURM for processes that srun started.

        Raises:
            InputError: when they are no numbers or do not fit.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "RANK" not in environment and "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if names[0] not in environment or names[1] not in environment:
            return cls()
        try:
            index, size = int(environment[names[0]]), int(environment[names[1]])
            local_index = int(environment.get(names[2], index))
        except ValueError as e:
            raise InputError(f"{', '.join(names)}: not whole numbers ({e})") from e
        if not 0 <= index < size or local_index < 0:
            raise InputError(f"{names[0]} {index} of {names[1]} {size}, {names[2]} {local_index}: they do not fit")
        return cls(index, size, local_index)


@dataclass(frozen=True)
class Ranks:
    """This process is one worker of a group, on the device of its local index.

    `bars` shows how loading goes.
    """

    group: ProcessGroup
    devices: Sequence[str | None]  # of this machine
    bars: LoadingBar | None = None
    workers = 1

    @property
    def index(self) -> int:
        return self.group.index

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def device(self) -> str | None:
        """The device of this process."""
        return self.devices[self.group.local_index % len(self.devices)]

    def check(self, settings: Settings, output_dir: Path) -> None:
        """See `check_here`."""
        check_here(settings, output_dir, [self.device])

    def draw(self, job: Job, listen: Listener) -> dict[str, float]:
        """Seconds per stage, once this process's share of the prompts and what others leave is drawn.

        Process 0 hears of what all processes draw, from the files in the folder.
        """
        todo = {p.index for p in job.todo}
        own, rest = share(job.chosen, todo, job.together, self.index, self.size)
        assignment = Assignment(self.index, self.device, own, rest, job.description, job.failed_before, job.debug)

        def hear(event: Event) -> None:
            if isinstance(event, Message | WorkerLoaded):
                listen(event)

        watching = watched(job.store, job.todo, job.failed_before, listen)
        with watching if self.index == 0 else contextlib.nullcontext():
            return work(job.store, job.settings, assignment, hear, self.bars)


class _Watch:
    """What was drawn of prompts, by names and times of the files in the folder that processes share."""

    def __init__(
        self, store: Store, prompts: Sequence[PromptRecord], failed_before: Mapping[int, int], listen: Listener
    ) -> None:
        self._store, self._failed_before, self._listen = store, failed_before, listen
        self._states = {p.index: store.prompt_state(p.index) for p in prompts}
        self._begun = {index: state.record for index, state in self._states.items()}
        self._waiting = {p.index: p for p in prompts}

    def look(self) -> None:
        """Reports what is new since the last look."""
        for index, prompt in list(self._waiting.items()):
            before, now = self._states[index], self._store.prompt_state(index)
            self._states[index] = now
            count = sum(b[1] for name, b in now.batches.items() if before.batches.get(name) != b)
            if count:
                self._listen(ImagesDrawn(count))
            failure = self._store.failure(index)
            if now.record is not None and now.record != self._begun[index]:
                del self._waiting[index]
                answers = self._store.answers(index)
                self._listen(PromptFinished(index, prompt.prompt, len(answers), answers.count("yes")))
            elif failure is not None and failure[0] != self._failed_before.get(index):
                del self._waiting[index]
                self._listen(PromptFailed(index, failure[1]))

    def keep_looking(self, done: threading.Event) -> None:
        """Looks every LOOK seconds until the event is set."""
        while not done.wait(LOOK):
            self.look()


@contextlib.contextmanager
def watched(
    store: Store, prompts: Sequence[PromptRecord], failed_before: Mapping[int, int], listen: Listener
) -> Iterator[None]:
    """For a `with`: reports what any process draws of the prompts.

    It looks at the files that appear in the folder they share.
    """
    watch, done = _Watch(store, prompts, failed_before, listen), threading.Event()
    thread = threading.Thread(target=watch.keep_looking, args=(done,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        watch.look()
