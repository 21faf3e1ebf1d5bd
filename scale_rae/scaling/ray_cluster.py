"""Launcher: workers on a Ray cluster. An actor on each GPU draws the prompts that one driver sends.

The driver has the experiment's lock, and gives each group to one worker at a time. A group is what a worker draws together:
one prompt, or several in an adaptive search. Workers write the results themselves, so nothing is lost with a worker, a node
or the driver; what a worker that died was drawing is resumed by another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import itertools
import os
import re
import secrets
import socket
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from scale_rae import processes
from scale_rae.errors import InputError, MissingExtraError, ScaleRAEError, first_line, need
from scale_rae.options import lora_parts
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.events import Event, Listener, Message, PromptFailed
from scale_rae.scaling.launch import Job, share
from scale_rae.scaling.object_store import results_folder
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import WAIT, Assignment, Worker, open_worker

LOOK = 1.0  # seconds between looks at the cluster
REACH = 10.0  # seconds for a cluster to answer at its address
PAUSE = 10.0  # seconds after a worker died while loading, before another is tried
SILENT = 60.0  # seconds without any worker until a message says so (again)
OLDEST_RAY = (2, 52)  # the first that asks for a token
TRIES = 3  # workers that may die of one prompt, or in a row while loading
MEASURED_ON = 8  # prompts that a worker may measure the batch size on; what it draws is given to it later

Group: TypeAlias = list[PromptRecord]  # what a worker draws together

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def check_installed() -> None:
    """Raises MissingExtraError when Ray is not installed, or so old that anyone could command it."""
    need("ray", "--launcher ray", "ray")
    version = importlib.metadata.version("ray")
    if tuple(int(part) for part in re.findall(r"[0-9]+", version)[:2]) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise MissingExtraError(
            f"--launcher ray: Ray {version} knows no tokens, so whoever reaches its ports could run code here; Ray "
            f'{oldest} or newer is needed: pip install -U "scale-rae[ray]"'
        )


@dataclass(frozen=True)
class RayCluster:
    """One worker per GPU of a Ray cluster, or per `num_cpus_per_worker` CPUs.

    There are `num_workers` of them, or all there can be.
    """

    num_cpus_per_worker: int | None = None
    num_workers: int | None = None
    index = 0
    size = 1
    workers = 1  # known from the start; the cluster gives more, or fewer

    def check(self, settings: Settings, output_dir: Path) -> None:
        """Raises InputError for numbers that cannot be, MissingExtraError without Ray.

        Workers check their devices.
        """
        for name in ("num_cpus_per_worker", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        check_installed()

    def draw(self, job: Job, listen: Listener) -> dict[str, float]:
        """Has the cluster draw the job's prompts; returns seconds per stage, summed over the workers.

        Raises:
            InputError: when no node is large enough for a worker, or the models are not the experiment's.
            ScaleRAEError: when there is no cluster, a model cannot be loaded, or something not written.
        """
        with connected(listen):
            return _Driver(self, job, listen).run()

    def capacity(self) -> int:
        """For how many workers the cluster's nodes are large enough, whoever else is using them."""
        import ray

        resource, each = ("GPU", 1) if self.num_cpus_per_worker is None else ("CPU", self.num_cpus_per_worker)
        return sum(int(node["Resources"].get(resource, 0) // each) for node in ray.nodes() if node["Alive"])


def _reach(address: str) -> None:
    """Raises OSError when nobody listens at [ray://]host:port, which Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # a name that Ray has for it
    socket.create_connection((host.strip("[]"), int(port)), REACH).close()


@contextlib.contextmanager
def connected(listen: Listener) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, of `ray start` here, or one that is started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or None
    with contextlib.ExitStack() as stack:
        try:
            _reach(address or "")
            # Ray has workers search the driver's working folder, and before Python's own modules.
            with contextlib.chdir(processes.search_folder()):
                ray.init("auto", **_QUIET)
            stack.callback(ray.shutdown)
        except Exception as e:
            if address is not None or not isinstance(e, ConnectionError):
                where = "auto" if address is None else f"{address} (RAY_ADDRESS)"
                raise ScaleRAEError(
                    f"no connection to the Ray cluster at {where}: {type(e).__name__}: {first_line(e)}"
                ) from e
            text = "no Ray cluster here (RAY_ADDRESS, ray start): one is started on this machine"
            listen(Message(text))
            stack.enter_context(_started())
        yield


@contextlib.contextmanager
def _started() -> Iterator[None]:
    """A cluster started on this machine, which takes orders from this process and its children only.

    Ray opens its ports to the network, whatever address it is given, and whoever may talk to them can run code. So they ask
    for a token, which is made here and exists only in the environment of these processes.
    """
    import ray

    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        with _environment(processes.environment() | token):
            if not _read_authentication_again():
                raise ScaleRAEError(
                    f"--launcher ray: no cluster is started here, since Ray {ray.__version__} would not ask for a token; "
                    "start one with `ray start --head`, or take another version of Ray"
                )
            with contextlib.chdir(processes.search_folder()):
                # Results go to files: next to nothing passes through Ray's memory.
                ray.init("local", include_dashboard=False, object_store_memory=100 * 2**20, **_QUIET)
            yield
    finally:
        ray.shutdown()
        _read_authentication_again()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """For a `with`: this process, and processes that it starts, see exactly these environment variables."""
    before = dict(os.environ)
    try:
        _set_environment(values)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _read_authentication_again() -> bool:
    """Whether Ray asks for a token, once it has read the RAY_AUTH_… variables again.

    By itself it reads them once in a process.
    """
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    return bool(raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN)


@dataclass
class Reply:
    """What a worker returns after loading, or after a group.

    `busy`: another worker has the group, so it is to be given out again.
    """

    node: str
    events: list[Event]
    seconds: dict[str, float]
    busy: bool = False


class Actor:
    """What runs in the cluster: a worker that is given one group of prompts at a time."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._worker: Worker

    def load(self, folder: str, settings: Settings, assignment: Assignment, holder: str) -> Reply:
        """Loads the models. `holder` is what the driver reads in the results' folder about who has it.

        Raises:
            InputError: when `folder` is another folder on this node.
        """
        # A name that no other writer has, be it on another machine or what is left of an earlier run.
        store = Store(results_folder(folder), settings, f"ray-{uuid.uuid4().hex}")
        if not store.remote and store.holder() != holder:
            raise InputError(
                f"{folder}: not the same folder on node {socket.gethostname()}; all nodes must share it, or use a store "
                "(--output-dir s3://…)"
            )
        self._worker = open_worker(store, settings, assignment, self._events.append)
        return self._reply()

    def attempt(self, group: Group) -> Reply:
        """Draws what is missing of a group of prompts."""
        tried = self._worker.attempt(group)
        if not tried:
            time.sleep(WAIT)  # what is left of an earlier run, or of a lost node, is still drawing it
        return dataclasses.replace(self._reply(), busy=not tried)

    def _reply(self) -> Reply:
        import ray

        events = list(self._events)
        self._events.clear()
        node = ray.get_runtime_context().get_node_id()
        return Reply(node, events, self._worker.seconds())


@dataclass(eq=False)
class _RayWorker:
    """A worker as the driver sees it. `node` and `seconds` are those of its last reply."""

    number: int
    actor: Any
    node: str | None = None  # None until it has loaded
    seconds: dict[str, float] = field(default_factory=dict)


class _Driver:
    """Keeps as many workers as the cluster has room for, and gives each a group until none is left."""

    def __init__(self, cluster: RayCluster, job: Job, listen: Listener) -> None:
        self._cluster, self._job, self._listen, self._store = cluster, job, listen, job.store
        self._settings = dataclasses.replace(
            job.settings,
            model_path=_anywhere(job.settings.model_path),
            decoder_repo=_anywhere(job.settings.decoder_repo),
            reward_path=_anywhere(job.settings.reward_path),
            lora=tuple(_adapter_anywhere(text) for text in job.settings.lora),
        )
        folder = job.store.folder
        self._folder = str(folder if job.store.remote else folder.absolute())
        todo = {p.index for p in job.todo}
        self._queue: deque[Group] = deque(share(job.chosen, todo, job.together, 0, 1)[0])
        self._workers: list[_RayWorker] = []
        self._idle: list[_RayWorker] = []
        self._underway: dict[Any, tuple[_RayWorker, Group | None]] = {}  # by reply; None: it loads
        self._numbers = itertools.count()
        self._deaths: dict[tuple[int, ...], int] = {}  # by the numbers of a group's prompts
        self._deaths_loading = 0  # in a row
        self._not_before = 0.0  # when the next worker may be started
        self._first_alone = job.store.read_experiment() is None  # the first worker writes experiment.json for all
        self._seconds: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Has all prompts drawn; returns seconds per stage, summed over the workers."""
        import ray

        if self._cluster.num_workers is None and not self._cluster.capacity():
            cpus = self._cluster.num_cpus_per_worker
            raise InputError(
                "--launcher ray: the cluster has no GPU; --num-cpus-per-worker N has workers use CPUs"
                if cpus is None
                else f"--num-cpus-per-worker {cpus}: no node of the cluster has that many"
            )
        heard = time.monotonic()
        try:
            while self._queue or self._groups_underway():
                self._job.lock.check()
                self._start_workers()
                while self._queue and self._idle:
                    worker, group = self._idle.pop(), self._queue.popleft()
                    self._underway[worker.actor.attempt.remote(group)] = (worker, group)
                if any(worker.node is not None for worker in self._workers):
                    heard = time.monotonic()
                elif time.monotonic() - heard > SILENT:
                    heard = time.monotonic()
                    self._say("no worker is at work: waiting for the cluster to have room for one, and for it to load")
                if not self._underway:
                    time.sleep(LOOK)
                    continue
                for reply in ray.wait(list(self._underway), timeout=LOOK)[0]:
                    self._hear(reply)
        finally:
            for worker in self._workers:
                self._dismiss(worker)
        return self._seconds

    def _groups_underway(self) -> int:
        return sum(group is not None for _, group in self._underway.values())

    def _start_workers(self) -> None:
        """Starts as many workers as there is room and work for, unless one died while loading just now."""
        import ray

        if time.monotonic() < self._not_before:
            return
        cpus = self._cluster.num_cpus_per_worker
        options = {"num_gpus": 1, "num_cpus": 0} if cpus is None else {"num_gpus": 0, "num_cpus": cpus}
        groups = len(self._queue) + self._groups_underway()
        wanted = min(self._cluster.num_workers or self._cluster.capacity(), groups)
        for _ in range(len(self._workers), min(wanted, 1) if self._first_alone else wanted):
            worker = _RayWorker(next(self._numbers), ray.remote(Actor).options(**options).remote())
            self._workers.append(worker)
            assignment = Assignment(
                worker.number,
                "cpu" if cpus is not None else "cuda:0",  # the one that Ray lets it see
                [[prompt] for prompt in self._job.todo[:MEASURED_ON]],
                [],
                self._job.description,
                self._job.failed_before,
                self._job.debug,
            )
            loading = worker.actor.load.remote(self._folder, self._settings, assignment, self._store.holder())
            self._underway[loading] = (worker, None)

    def _hear(self, ref: Any) -> None:
        """Takes in the reply of a worker: its events pass on, and it is idle; or it is lost."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        worker, group = self._underway.pop(ref)
        try:
            reply: Reply = ray.get(ref)
        except RayTaskError as e:
            if isinstance(e.cause, ScaleRAEError):
                raise e.cause from e
            self._lose(worker, group, e)
        except RayError as e:
            self._lose(worker, group, e)
        else:
            worker.node = reply.node
            for stage, seconds in reply.seconds.items():
                self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds - worker.seconds.get(stage, 0.0)
            worker.seconds = reply.seconds
            for event in reply.events:
                self._listen(event)
            self._deaths_loading, self._first_alone = 0, False
            if group is not None and reply.busy:
                self._queue.append(group)
            self._idle.append(worker)

    def _lose(self, worker: _RayWorker, group: Group | None, error: Exception) -> None:
        """Removes a worker that is gone; its group is the next to be given out.

        If workers keep dying of a group, each of its prompts is given out alone. A prompt that workers keep dying of is
        recorded as failed.
        """
        import ray
        from ray.exceptions import ActorDiedError, RayTaskError

        self._workers.remove(worker)
        self._dismiss(worker)
        how = f"{type(error).__name__}: {first_line(error)}"
        if group is None:
            self._say(f"worker {worker.number} died while it loaded ({how})")
            self._deaths_loading += 1
            self._not_before = time.monotonic() + PAUSE
            if self._deaths_loading >= TRIES and not any(w.node is not None for w in self._workers):
                raise ScaleRAEError(f"{self._deaths_loading} workers in a row died while they loaded; the last: {how}")
            return
        # Not the prompts' fault where the node died, or may have: Ray reports that late.
        at_fault = isinstance(error, ActorDiedError | RayTaskError) and any(
            node["NodeID"] == worker.node and node["Alive"] for node in ray.nodes()
        )
        numbers = tuple(p.index for p in group)
        deaths = self._deaths[numbers] = self._deaths.get(numbers, 0) + at_fault
        which = f"prompt{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
        if deaths < TRIES:
            self._say(
                f"worker {worker.number} is gone ({how}); {which} go{'' if len(numbers) > 1 else 'es'} to another"
            )
            self._queue.appendleft(group)
            return
        if len(group) > 1:
            self._say(f"worker {worker.number} is gone ({how}): {deaths} died of {which}; each is tried alone")
            self._queue.extendleft([prompt] for prompt in reversed(group))
            return
        (prompt,) = group
        text = f"{deaths} workers died of it; the last: {how}"
        self._store.fail(prompt.index, text, deaths)
        self._listen(PromptFailed(prompt.index, text))

    def _dismiss(self, worker: _RayWorker) -> None:
        import ray

        with contextlib.suppress(Exception):  # it is gone already, or the cluster is
            ray.kill(worker.actor)

    def _say(self, text: str) -> None:
        self._listen(Message(text))


def _adapter_anywhere(text: str) -> str:
    """DIR[:WEIGHT] with `_anywhere`'s folder."""
    name, weight = lora_parts(text)
    return f"{_anywhere(name)}:{weight:g}"


def _anywhere(name: Any) -> Any:
    """A folder's absolute path, which is the same wherever a worker is started; other names unchanged."""
    from scale_rae.hub import BUNDLED

    if not name or name in BUNDLED or not Path(name).expanduser().exists():
        return name
    return str(Path(name).expanduser().absolute())
