"""`run`: checks, the plan, the outcome.

A `Launcher` gets prompts to workers: local, ranks or ray_cluster. Each launcher is a module; cli/scale.py chooses.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from scale_rae.errors import InputError
from scale_rae.files import check_name
from scale_rae.options import Speed
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.events import Event, ImagesDrawn, Listener, Message, Planned, WorkerLoaded, printable_event
from scale_rae.scaling.experiment import experiment_record, setting_differences
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Finding, RunLock, Store

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What a launcher gets to do: an experiment, and those of a run's prompts that are not finished.

    `description` is experiment.json's part on settings and prompts. `failed_before` has the time of failure (ns) of prompts
    that failed in earlier runs. `lock` keeps other runs out; it is held as long as any process has its files.
    """

    store: Store
    settings: Settings
    description: dict[str, Any]
    chosen: Sequence[PromptRecord]  # the run's prompts
    todo: Sequence[PromptRecord]  # those of them that are not finished
    failed_before: dict[int, int]
    lock: RunLock
    debug: bool

    @property
    def together(self) -> int:
        """How many prompts a worker draws together."""
        return self.settings.prompts_together(self.description["prompts"]["count"])


class Launcher(Protocol):
    """A way to have prompts drawn.

    A new one is a module with such a class, and a line in `cli.scale`'s choice.
    """

    @property
    def index(self) -> int:
        """This process's number among those started together for one run; process 0 plans and reports."""

    @property
    def size(self) -> int:
        """How many processes were started together; 1 for a launcher that starts its workers itself."""

    @property
    def workers(self) -> int:
        """How many workers this process is known to have when the run begins."""

    def check(self, settings: Settings, output_dir: Path) -> None:
        """Raises a ScaleRAEError for what this launcher cannot do. Called before anything is made or written."""

    def draw(self, job: Job, listen: Listener) -> dict[str, float]:
        """Has `job.todo` drawn; returns the workers' seconds per stage, summed.

        Prompts that fail are recorded by the workers; prompts that no worker could draw are left.
        """


@dataclass
class RunSummary:
    """How a run ended.

    `failed` has the errors of prompts that cannot be drawn, `unfinished` the prompts that are left.
    """

    folder: Path
    prompts: int
    drawn: int  # images, in this run
    failed: dict[int, str]
    unfinished: list[int]
    seconds: float  # in all
    working: float  # of them, since the first worker had loaded
    stages: dict[str, float] = field(default_factory=dict)
    search: dict[str, float] | None = None  # sums over the finished prompts of an adaptive search


def share(
    prompts: Sequence[PromptRecord], todo: Collection[int], together: int, worker: int, workers: int
) -> tuple[list[list[PromptRecord]], list[list[PromptRecord]]]:
    """(a worker's own groups of prompts, the other groups, which it takes over in the end).

    Own are every `workers`-th from its number on. `together` prompts that follow one another are a group. Groups without any of
    the prompts that are `todo` are left out.
    """
    groups = [list(prompts[i : i + together]) for i in range(0, len(prompts), together)]
    own = [group for group in groups[worker::workers] if any(p.index in todo for p in group)]
    rest = [g for i, g in enumerate(groups) if i % workers != worker and any(p.index in todo for p in g)]
    return own, rest


def run(
    settings: Settings,
    prompts: Sequence[PromptRecord],
    output_dir: Path,
    launcher: Launcher,
    limit: int | None = None,
    listen: Listener = lambda event: None,
    debug: bool = False,
) -> RunSummary:
    """Draws and scores whatever of an experiment is missing.

    Args:
        launcher: has the prompts drawn.
        limit: only the first `limit` prompts.
        listen: called with events as things happen. Of processes that were started together, process 0 hears of what all of
            them draw, the others of no more than messages.

    Raises:
        InputError: when the folder holds an experiment with other settings, or the launcher cannot use it.
        OutputError: when another run has the folder, or something cannot be written; what is finished is kept.
        ScaleRAEError: when a model or reward cannot be loaded.
    """
    settings.check()
    _check_names(settings, output_dir)
    Speed(settings.compile, settings.quantize).check()
    launcher.check(settings, output_dir)
    counter, leads = _Counter(listen), launcher.index == 0
    store = Store(settings.folder(output_dir), settings, f"r{launcher.index}")
    made = store.missing_folders() if launcher.size == 1 else []
    description = experiment_record(settings, prompts)
    with contextlib.closing(store.lock_run(launcher.index, launcher.size)) as lock:
        try:
            recorded = _recorded(store, description, leads, counter)
            settings = settings.resumed(recorded)
            store = store.with_settings(settings)
            chosen = list(prompts[:limit])
            untouched = store.remote and recorded is None  # nothing is there: spares the requests of looking
            todo = chosen if untouched else _unfinished(store, chosen, leads, counter)
            counter(Planned(len(todo), len(chosen) - len(todo), settings.usual_total, launcher.workers))
            failures = () if untouched else _each(lambda p: store.failure(p.index), todo)
            failed_before = {p.index: failure[0] for p, failure in failures if failure is not None}
            job = Job(store, settings, description, chosen, todo, failed_before, lock, debug)
            summary = _summary(job, counter, launcher.draw(job, counter) if todo else {})
            if leads:
                summary.search = _searched(store, chosen) if settings.is_adaptive else None
                _note_end(store, recorded or {}, summary, {p.index for p in chosen}, bool(todo))
        except InputError:
            store.remove_unused(made)
            raise
    return summary


def _check_names(settings: Settings, output_dir: Path) -> None:
    """Raises InputError for a file or folder name that no file system takes."""
    for name, what in (
        (str(output_dir), "output folder"),
        (settings.metadata_file, "prompt file"),
        (settings.question_name, "question template"),
        (settings.model_path, "model"),
        (settings.decoder_repo, "decoder"),
        (settings.reward_path, "reward"),
        *((name, "adapter") for name in settings.lora),
    ):
        check_name(name or "", what)


def _recorded(store: Store, description: Mapping[str, Any], leads: bool, listen: Listener) -> dict[str, Any] | None:
    """What experiment.json says, None for a new experiment.

    The process that leads restores a damaged one first.

    Raises:
        InputError: when the experiment has other settings.
    """
    if leads and (problem := store.restore_experiment()):
        listen(Message(problem))
    recorded = store.read_experiment()
    if recorded is not None and (found := setting_differences(recorded, description)):
        raise InputError(
            f"{store.folder}: holds an experiment with other settings: {'; '.join(found)}; choose another "
            "--output-dir, or give those settings to go on with it"
        )
    return recorded


def _summary(job: Job, counter: _Counter, stages: dict[str, float]) -> RunSummary:
    """How the run ended, by what it left in the folder."""
    store, end = job.store, time.perf_counter()
    seconds, working = end - counter.start, end - (counter.loaded or end)
    summary = RunSummary(store.folder, len(job.chosen), counter.images, {}, [], seconds, working, stages)
    for prompt, (failure, is_there) in _each(lambda p: (store.failure(p.index), store.has_record(p.index)), job.todo):
        if failure is not None:
            summary.failed[prompt.index] = failure[1]
        elif not is_there:
            summary.unfinished.append(prompt.index)
    return summary


def _unfinished(store: Store, prompts: Sequence[PromptRecord], leads: bool, listen: Listener) -> list[PromptRecord]:
    """The prompts that are not finished.

    The process that leads also reports what is damaged, and mends what needs no drawing: an earlier error beside a result,
    a record of an older version with fewer fields.
    """

    def look(prompt: PromptRecord) -> Finding:
        finding = store.inspect(prompt)
        if finding.finished and leads:
            store.tidy(prompt.index)
        return finding

    todo = []
    for prompt, finding in _each(look, prompts):
        if not finding.finished:
            todo.append(prompt)
        if leads:
            for problem in finding.problems:
                listen(Message(f"{problem}; made again"))
            if finding.newer_record is not None:
                store.renew(prompt.index, finding.newer_record)
    return todo


def _note_end(store: Store, recorded: Mapping[str, Any], summary: RunSummary, chosen: set[int], drew: bool) -> None:
    """Adds to experiment.json how the run ended.

    Where nothing was to do, it does so only if the run before was killed too early for it. What is recorded of prompts that
    were not `chosen` stays.
    """
    ended: dict[str, Any] = {}
    for name, now in (("failed", summary.failed), ("unfinished", summary.unfinished)):
        before = recorded.get(name)
        not_chosen = [i for i in before if isinstance(i, int) and i not in chosen] if isinstance(before, list) else []
        ended[name] = sorted([*now, *not_chosen])
    if not drew and "seconds" in recorded and all(recorded.get(name) == value for name, value in ended.items()):
        return
    seconds = recorded.get("seconds")
    summed = {"total": summary.seconds, "working": summary.working} | summary.stages
    for name, value in seconds.items() if isinstance(seconds, dict) else ():
        if isinstance(value, int | float):
            summed[name] = summed.get(name, 0.0) + value
    summed = {name: round(value, 3) for name, value in summed.items()}
    found = {} if summary.search is None else {"search": summary.search}
    store.update_experiment({"seconds": summed, **ended, **found})


def _searched(store: Store, prompts: Sequence[PromptRecord]) -> dict[str, float]:
    """What adaptive searches took, summed over the finished prompts."""
    summed: dict[str, float] = {}
    for _, counts in _each(lambda p: store.search_counts(p.index), prompts):
        for name, value in (counts or {}).items():
            summed[name] = round(summed.get(name, 0) + value, 2)
    return summed


def _each(look: Callable[[PromptRecord], T], prompts: Sequence[PromptRecord]) -> Iterator[tuple[PromptRecord, T]]:
    """What `look` returns for each prompt, in order; 32 at a time, since files may be far away."""
    with ThreadPoolExecutor(32) as pool:
        for i in range(0, len(prompts), 1024):
            some = prompts[i : i + 1024]
            yield from zip(some, pool.map(look, some), strict=True)


class _Counter:
    """Passes events on, as they may be printed; counts images.

    It also notes when the run began and when the first worker had loaded.
    """

    def __init__(self, listen: Listener) -> None:
        self._listen = listen
        self.images = 0
        self.start = time.perf_counter()
        self.loaded: float | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, ImagesDrawn):
            self.images += event.count
        elif isinstance(event, WorkerLoaded) and self.loaded is None:
            self.loaded = time.perf_counter()
        self._listen(printable_event(event))
