"""Runs an experiment: checks what is there, splits the prompts among workers, follows them to the end."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scale_rae import processes
from scale_rae.errors import DeviceError, InputError, OutputError, ScaleRAEError, printable
from scale_rae.files import check_name
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.experiment import describe, setting_differences
from scale_rae.scaling.ray_launch import Cluster
from scale_rae.scaling.remote import is_remote
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import RunLock, Store
from scale_rae.scaling.worker import Listener, Order, encode_order, work

_LOOK = 1.0  # seconds between looks at the folder that a launcher's processes share

T = TypeVar("T")

if TYPE_CHECKING:
    from scale_rae.opening import LoadingBar


@dataclass(frozen=True)
class World:
    """This process's place among those that a launcher (torchrun, SLURM, …) started; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
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
            rank, size = int(environment[names[0]]), int(environment[names[1]])
            local_rank = int(environment.get(names[2], rank))
        except ValueError as e:
            raise InputError(f"{', '.join(names)}: not whole numbers ({e})") from e
        if not 0 <= rank < size or local_rank < 0:
            raise InputError(f"{names[0]} {rank} of {names[1]} {size}, {names[2]} {local_rank}: they do not fit")
        return cls(rank, size, local_rank)


@dataclass
class Outcome:
    """How a run ended. `failed` has the errors of all prompts that could not be drawn, `unfinished` what is left to do."""

    folder: Path
    prompts: int
    drawn: int  # images, in this run
    failed: dict[int, str]
    unfinished: list[int]
    seconds: float  # in all
    working: float  # of them, since the first worker had loaded
    stages: dict[str, float] = field(default_factory=dict)


def default_devices(device: str | None = None) -> list[str | None]:
    """The device named, else every CUDA device that torch sees, else the best there is."""
    import torch

    if device is None and torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [device]


def run(
    settings: Settings,
    prompts: Sequence[PromptRecord],
    output_dir: Path,
    devices: Sequence[str | None] = (None,),
    limit: int | None = None,
    listen: Listener = lambda event: None,
    world: World | None = None,
    bars: LoadingBar | None = None,
    debug: bool = False,
    cluster: Cluster | None = None,
) -> Outcome:
    """Draws and judges whatever of an experiment is missing.

    Args:
        devices: one worker each; processes of a launcher take the one of their local rank.
        limit: only the first so many prompts.
        listen: called with events (dicts) as things happen: plan, loaded, images, prompt, failed, say. Of a launcher's
            processes, that of rank 0 hears of what all of them draw, the others of nothing but say.
        cluster: whose workers draw, instead of those on `devices`.

    Raises:
        InputError: when the folder holds an experiment with other settings, or is in a store and there is no cluster.
        OutputError: when another run has the folder, or something cannot be written; what is finished is kept.
        ScaleRAEError: when a model or reward cannot be loaded.
    """
    from scale_rae.float8 import check_device
    from scale_rae.memory import pick_device, pick_dtype
    from scale_rae.options import Speed, check_options

    settings.check()
    for name, what in (
        (str(output_dir), "output folder"),
        (settings.metadata_file, "prompt file"),
        (settings.question_name, "question template"),
        (settings.model_path, "model"),
        (settings.decoder_repo, "decoder"),
        (settings.reward_path, "reward"),
    ):
        check_name(name or "", what)
    listen = _printable(listen)
    Speed(settings.compile, settings.quantize).check()
    check_options(settings.guidance_level, settings.steps, settings.solver, settings.guidance_interval)
    world = world or World()
    if world.size > 1:
        devices = [devices[world.local_rank % len(devices)]]
    if cluster is not None and world.size > 1:
        raise InputError(f"--launcher ray: to be started once, not in {world.size} processes of torchrun or srun")
    if cluster is None and is_remote(output_dir):
        raise InputError(
            f"--output-dir {output_dir}: a store has no locks, by which workers that were launched so share prompts; "
            "use --launcher ray, on one machine too"
        )
    for device in devices if cluster is None else ():  # a cluster's are known to its workers only
        place = pick_device(device)
        dtype = pick_dtype(settings.dtype, place)
        if settings.quantize is not None:
            check_device(place, dtype)
    start = time.perf_counter()
    store = Store(settings.folder(output_dir), settings, f"r{world.rank}")
    description = describe(settings, prompts)
    lock = store.lock_run(world.rank, world.size)
    try:
        if world.rank == 0 and (problem := store.restore_experiment()):
            listen({"event": "say", "text": problem})
        recorded = store.read_experiment()
        if recorded is not None and (found := setting_differences(recorded, description)):
            raise InputError(
                f"{store.folder}: holds an experiment with other settings: {'; '.join(found)}; choose another "
                "--output-dir, or give those settings to go on with it"
            )
        settings = store.settings = settings.resumed(recorded)
        chosen = list(prompts[:limit])
        todo = []
        untouched = store.remote and recorded is None  # nothing there: spares the requests of looking

        def look(prompt: PromptRecord) -> tuple[bool, list[str]]:
            finished, problems = store.check(prompt)
            if finished and world.rank == 0:
                store.tidy(prompt.index)
            return finished, problems

        for prompt, (finished, problems) in _each(look, chosen) if not untouched else ():
            if world.rank == 0:
                for problem in problems:
                    listen({"event": "say", "text": f"{problem}; made again"})
            if not finished:
                todo.append(prompt)
        todo = chosen if untouched else todo
        plan = {"todo": len(todo), "finished": len(chosen) - len(todo), "each": settings.total, "workers": len(devices)}
        listen({"event": "plan", **plan})
        counter = _Counter(listen)
        stages: dict[str, float] = {}
        if todo:
            failures = _each(lambda p: store.failure(p.index), todo) if not untouched else ()
            failed_before = {p.index: failure[0] for p, failure in failures if failure is not None}
            if cluster is not None:
                order = Order(0, None, todo, [], description, failed_before, debug)
                stages = cluster.draw(store, settings, order, counter, lock)
            elif len(devices) > 1:
                orders = [
                    Order(
                        rank,
                        device,
                        todo[rank :: len(devices)],
                        [p for i, p in enumerate(todo) if i % len(devices) != rank],
                        description,
                        failed_before,
                        debug,
                    )
                    for rank, device in enumerate(devices)
                ]
                stages = _spawn(store, settings, orders, counter, lock)
            else:
                watch = _watching(store, todo, failed_before, counter) if world.size > 1 and world.rank == 0 else None
                left = {p.index for p in todo}
                own = [p for p in chosen[world.rank :: world.size] if p.index in left]
                mine = {p.index for p in own}
                others = [p for p in todo if p.index not in mine]
                order = Order(world.rank, devices[0], own, others, description, failed_before, debug)
                with watch or contextlib.nullcontext():
                    stages = work(store, settings, order, counter if world.size == 1 else _only_say(counter), bars)
        end = time.perf_counter()
        working = end - (counter.since or end)
        outcome = Outcome(store.folder, len(chosen), counter.images, {}, [], end - start, working, stages)
        for prompt, (failure, is_there) in _each(lambda p: (store.failure(p.index), store.has_record(p.index)), todo):
            if failure is not None:
                outcome.failed[prompt.index] = failure[1]
            elif not is_there:
                outcome.unfinished.append(prompt.index)
        if world.rank == 0:
            _note_end(store, recorded or {}, outcome, {p.index for p in chosen}, bool(todo))
        return outcome
    finally:
        lock.close()


def _note_end(store: Store, recorded: Mapping[str, Any], outcome: Outcome, chosen: set[int], drew: bool) -> None:
    """Adds to experiment.json how the run ended; where nothing was to do, only if the run before was killed too early for it.

    What is recorded of prompts that were not `chosen` stays.
    """
    ended: dict[str, Any] = {}
    for name, now in (("failed", outcome.failed), ("unfinished", outcome.unfinished)):
        before = recorded.get(name)
        others = [i for i in before if isinstance(i, int) and i not in chosen] if isinstance(before, list) else []
        ended[name] = sorted([*now, *others])
    if not drew and "seconds" in recorded and all(recorded.get(name) == value for name, value in ended.items()):
        return
    seconds = recorded.get("seconds")
    summed = {"total": outcome.seconds, "working": outcome.working} | outcome.stages
    for name, value in seconds.items() if isinstance(seconds, dict) else ():
        if isinstance(value, int | float):
            summed[name] = summed.get(name, 0.0) + value
    summed = {name: round(value, 3) for name, value in summed.items()}
    store.update_experiment({"seconds": summed, **ended})


def _printable(listen: Listener) -> Listener:
    """A listener whose events have no control characters in their texts, which come from prompts, models and files."""

    def pass_on(event: dict[str, Any]) -> None:
        listen({k: printable(v, lines=True) if isinstance(v, str) else v for k, v in event.items()})

    return pass_on


def _each(look: Callable[[PromptRecord], T], prompts: Sequence[PromptRecord]) -> Iterator[tuple[PromptRecord, T]]:
    """What `look` says of each prompt, in order; many at once, since files may be far away."""
    with ThreadPoolExecutor(32) as pool:
        for i in range(0, len(prompts), 1024):
            some = prompts[i : i + 1024]
            yield from zip(some, pool.map(look, some), strict=True)


def _only_say(listen: Listener) -> Listener:
    return lambda event: listen(event) if event["event"] in ("say", "loaded") else None


@contextlib.contextmanager
def _watching(
    store: Store, prompts: Sequence[PromptRecord], failed_before: Mapping[int, int], listen: Listener
) -> Iterator[None]:
    """Tells of what any process draws of the prompts, from what appears in the folder they share."""
    progress = {p.index: store.progress(p.index) for p in prompts}
    begun = {index: found.record for index, found in progress.items()}
    waiting = {p.index: p for p in prompts}
    done = threading.Event()

    def look() -> None:
        for index, prompt in list(waiting.items()):
            before, now = progress[index], store.progress(index)
            progress[index] = now
            count = sum(b[1] for name, b in now.batches.items() if before.batches.get(name) != b)
            if count:
                listen({"event": "images", "count": count})
            failure = store.failure(index)
            if now.record is not None and now.record != begun[index]:
                del waiting[index]
                answers = store.answers(index)
                listen(
                    {
                        "event": "prompt",
                        "index": index,
                        "prompt": prompt.prompt,
                        "images": len(answers),
                        "yes": answers.count("yes"),
                    }
                )
            elif failure is not None and failure[0] != failed_before.get(index):
                del waiting[index]
                listen({"event": "failed", "index": index, "error": failure[1]})

    def keep_looking() -> None:
        while not done.wait(_LOOK):
            look()

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


class _Counter:
    """Passes events on, counts images, and knows since when a worker is at work."""

    def __init__(self, listen: Listener) -> None:
        self._listen = listen
        self.images = 0
        self.since: float | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "images":
            self.images += event["count"]
        elif event["event"] == "loaded" and self.since is None:
            self.since = time.perf_counter()
        self._listen(event)


def _spawn(
    store: Store, settings: Settings, orders: Sequence[Order], listen: Listener, lock: RunLock
) -> dict[str, float]:
    """A process for each order, followed until all have ended; returns their seconds, summed by stage.

    The processes share the run's lock, so that the folder stays locked until the last of them is gone.
    """
    events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    workers: list[subprocess.Popen[str]] = []
    stages: dict[str, float] = {}
    done: set[int] = set()
    unfit: list[DeviceError] = []
    try:
        for order in orders:
            workers.append(_start(store, settings, order, orders, lock))
            threading.Thread(target=_listen_to, args=(order.rank, workers[-1], events), daemon=True).start()
        open_workers = len(workers)
        while open_workers:
            rank, event = events.get()
            if event is None:
                open_workers -= 1
                code = workers[rank].wait()
                if rank not in done:
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    where = f"worker {rank} ({orders[rank].device}) died ({how}); its log is {store.log_file(rank)}"
                    rest = "; the others take over its prompts" if open_workers else ""
                    listen({"event": "say", "text": where + rest})
            elif event["event"] == "done":
                done.add(rank)
                for stage, seconds in event["seconds"].items():
                    stages[stage] = stages.get(stage, 0.0) + seconds
            elif event["event"] == "fatal" and event["kind"] == "DeviceError":  # of this device; others may be well
                unfit.append(DeviceError(event["error"]))
                done.add(rank)
                rest = "; the others take over its prompts" if len(unfit) < len(orders) else ""
                listen({"event": "say", "text": f"worker {rank} ({orders[rank].device}): {event['error']}{rest}"})
            elif event["event"] == "fatal":
                error = {"InputError": InputError, "OutputError": OutputError}.get(event["kind"], ScaleRAEError)
                raise error(event["error"])
            else:
                listen(event)
        if len(unfit) == len(orders):
            raise unfit[0]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
        for worker in workers:
            worker.wait()
            if worker.stdin is not None:
                worker.stdin.close()
    return stages


def _threads(device: str | None, devices: Sequence[str | None]) -> int:
    """OpenMP threads of a worker on `device`; `devices` are all workers' of this machine.

    On the CPU, its share of the cores. A GPU's worker needs few, and with one for every core the workers get in each
    other's way: two on 32 cores drew 1.4 times what one drew, with 4 threads each twice as much.
    """
    cores = os.cpu_count() or 1
    if device == "cpu":
        return max(1, cores // devices.count("cpu"))
    return max(1, min(4, cores // len(devices)))


def _start(
    store: Store, settings: Settings, order: Order, orders: Sequence[Order], lock: RunLock
) -> subprocess.Popen[str]:
    environment = processes.environment()
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("OMP_NUM_THREADS", str(_threads(order.device, [o.device for o in orders])))
    with store.open_log(order.rank) as log:
        worker = subprocess.Popen(
            processes.command("scale_rae.scaling.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            encoding="utf-8",
            pass_fds=[file.fileno() for file in lock.files],
        )
    assert worker.stdin is not None
    try:
        worker.stdin.write(encode_order(store, settings, order) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it died at once, and is reported like any that dies
    return worker


def _listen_to(rank: int, worker: subprocess.Popen[str], events: Any) -> None:
    import json

    assert worker.stdout is not None
    with worker.stdout:
        for line in worker.stdout:
            try:
                events.put((rank, json.loads(line)))
            except ValueError:
                continue  # half a line of a worker that was killed
    events.put((rank, None))
