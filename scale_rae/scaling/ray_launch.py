"""An experiment on a Ray cluster: one driver hands out prompts, an actor on each GPU draws them.

The driver has the experiment's lock and is the only one to give a prompt away, and gives it to one worker at a time. What a
worker has finished is in the results' folder, which it writes itself: so nothing is lost with a worker, a node or the driver,
and a prompt that comes back from a dead worker is gone on with.
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
from typing import Any

from scale_rae import processes
from scale_rae.errors import InputError, MissingExtraError, ScaleRAEError, first_line, need
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.remote import results_folder
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import RunLock, Store
from scale_rae.scaling.worker import PATIENCE, Listener, Order, Worker, loaded

LOOK = 1.0  # seconds between looks at the cluster
REACH = 10.0  # seconds for a cluster to answer at its address
PAUSE = 10.0  # seconds after a worker died while loading, before another is tried
SILENT = 60.0  # seconds without any worker until that is said (again)
OLDEST_RAY = (2, 52)  # the first that asks for a token
TRIES = 3  # workers that may die of one prompt, or in a row while loading


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def check_installed() -> None:
    """Raises an error when Ray is not there, or is one whose clusters take orders from whoever reaches them."""
    need("ray", "--launcher ray", "ray")
    version = importlib.metadata.version("ray")
    if tuple(int(part) for part in re.findall(r"[0-9]+", version)[:2]) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise MissingExtraError(
            f"--launcher ray: Ray {version} knows no tokens, so whoever reaches its ports could run code here; Ray "
            f'{oldest} or newer is needed: pip install -U "scale-rae[ray]"'
        )


@dataclass(frozen=True)
class Cluster:
    """Which workers an experiment gets of a Ray cluster: one a GPU, or one for each so many CPUs; all, or `num_workers`."""

    num_cpus_per_worker: int | None = None
    num_workers: int | None = None

    def check(self) -> None:
        """Raises InputError for numbers that cannot be."""
        for name in ("num_cpus_per_worker", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")

    def draw(self, store: Store, settings: Settings, order: Order, listen: Listener, lock: RunLock) -> dict[str, float]:
        """Has the cluster draw the order's own prompts; returns the workers' seconds, summed by stage.

        Raises:
            InputError: when the cluster has no place for a worker, or the models are not the experiment's.
            ScaleRAEError: when there is no cluster, a model cannot be loaded, or something not written.
        """
        self.check()
        check_installed()
        with _connected(listen):
            return _Driver(self, store, settings, order, listen, lock).run()

    def room(self) -> int:
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
def _connected(listen: Listener) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, else that of `ray start` on this machine, else one started here."""
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
            listen({"event": "say", "text": text})
            stack.enter_context(_started())
        yield


@contextlib.contextmanager
def _started() -> Iterator[None]:
    """A cluster started on this machine, which obeys nobody but this process and its children.

    Its ports are open to the network, whatever address it is given, and who may talk to them can run code. So they ask for a
    token, which is made here and is in nothing but the environment of these processes.
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
    """Has this process, and those it starts, see these variables and no others."""
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
    """Has Ray read the RAY_AUTH_… variables, which it does once in a process; whether it asks for a token now."""
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    return bool(raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN)


@dataclass
class _Reply:
    """What a worker says after loading, or after a prompt. `busy`: the prompt was another's; give it out again."""

    node: str
    events: list[dict[str, Any]]
    seconds: dict[str, float]
    busy: bool = False


class _Actor:
    """What runs in the cluster: worker.py's worker, given a prompt at a time."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._events: list[dict[str, Any]] = []
        self._worker: Worker

    def load(self, folder: str, settings: Settings, order: Order, holder: str) -> _Reply:
        """Loads the models. `holder` is what the results' folder says of who has it, if it is this folder."""
        # A name that no other writer has, be it on another machine or what is left of an earlier run.
        store = Store(results_folder(folder), settings, f"ray-{uuid.uuid4().hex}")
        if not store.remote and store.holder() != holder:
            raise InputError(
                f"{folder}: not the same folder on node {socket.gethostname()}; all nodes must share it, or use a store "
                "(--output-dir s3://…)"
            )
        self._worker = self._open.enter_context(loaded(store, settings, order, self._events.append))
        return self._reply()

    def attempt(self, prompt: PromptRecord) -> _Reply:
        """Draws what is missing of a prompt."""
        tried = self._worker.attempt(prompt)
        if not tried:
            time.sleep(PATIENCE)  # what is left of an earlier run, or of a lost node, is at it still
        return dataclasses.replace(self._reply(), busy=not tried)

    def _reply(self) -> _Reply:
        import ray

        events = list(self._events)
        self._events.clear()
        node = ray.get_runtime_context().get_node_id()
        return _Reply(node, events, dict(self._worker.seconds))


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it. `node` and `seconds` are those of its last reply."""

    number: int
    actor: Any
    node: str | None = None  # None until it has loaded
    seconds: dict[str, float] = field(default_factory=dict)


class _Driver:
    def __init__(
        self, cluster: Cluster, store: Store, settings: Settings, order: Order, listen: Listener, lock: RunLock
    ) -> None:
        self.cluster, self.store, self.order, self.listen, self.lock = cluster, store, order, listen, lock
        self.settings = dataclasses.replace(
            settings,
            model_path=_anywhere(settings.model_path),
            decoder_repo=_anywhere(settings.decoder_repo),
            reward_path=_anywhere(settings.reward_path),
        )
        self.folder = str(store.folder if store.remote else store.folder.absolute())
        self.queue = deque(order.own)
        self.hands: list[_Hand] = []
        self.idle: list[_Hand] = []
        self.working: dict[Any, tuple[_Hand, PromptRecord | None]] = {}  # by the reply waited for; None: loading
        self.numbers = itertools.count()
        self.deaths: dict[int, int] = {}  # by prompt
        self.deaths_loading = 0  # in a row
        self.not_before = 0.0  # when the next worker may be started
        self.alone = store.read_experiment() is None  # the first worker describes the experiment for all
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        import ray

        if self.cluster.num_workers is None and not self.cluster.room():
            cpus = self.cluster.num_cpus_per_worker
            raise InputError(
                "--launcher ray: the cluster has no GPU; --num-cpus-per-worker N has workers use CPUs"
                if cpus is None
                else f"--num-cpus-per-worker {cpus}: no node of the cluster has that many"
            )
        heard = time.monotonic()
        try:
            while self.queue or any(prompt is not None for _, prompt in self.working.values()):
                self.lock.check()
                self._start_workers()
                while self.queue and self.idle:
                    hand, prompt = self.idle.pop(), self.queue.popleft()
                    self.working[hand.actor.attempt.remote(prompt)] = (hand, prompt)
                if any(hand.node is not None for hand in self.hands):
                    heard = time.monotonic()
                elif time.monotonic() - heard > SILENT:
                    heard = time.monotonic()
                    self._say("no worker is at work: waiting for the cluster to have room for one, and for it to load")
                if not self.working:
                    time.sleep(LOOK)
                    continue
                for reply in ray.wait(list(self.working), timeout=LOOK)[0]:
                    self._hear(reply)
        finally:
            for hand in self.hands:
                self._dismiss(hand)
        return self.seconds

    def _start_workers(self) -> None:
        import ray

        if time.monotonic() < self.not_before:
            return
        cpus = self.cluster.num_cpus_per_worker
        options = {"num_gpus": 1, "num_cpus": 0} if cpus is None else {"num_gpus": 0, "num_cpus": cpus}
        prompts = len(self.queue) + sum(prompt is not None for _, prompt in self.working.values())
        wanted = min(self.cluster.num_workers or self.cluster.room(), prompts)
        for _ in range(len(self.hands), min(wanted, 1) if self.alone else wanted):
            hand = _Hand(next(self.numbers), ray.remote(_Actor).options(**options).remote())
            self.hands.append(hand)
            order = dataclasses.replace(
                self.order,
                rank=hand.number,
                device="cpu" if cpus is not None else "cuda:0",  # the one that Ray has it see
                own=self.order.own[:8],  # to measure on; what it draws is told later
            )
            loading = hand.actor.load.remote(self.folder, self.settings, order, self.store.holder())
            self.working[loading] = (hand, None)

    def _hear(self, ref: Any) -> None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        hand, prompt = self.working.pop(ref)
        try:
            reply: _Reply = ray.get(ref)
        except RayTaskError as e:
            if isinstance(e.cause, ScaleRAEError):
                raise e.cause from e
            self._lose(hand, prompt, e)
        except RayError as e:
            self._lose(hand, prompt, e)
        else:
            hand.node = reply.node
            for stage, seconds in reply.seconds.items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds - hand.seconds.get(stage, 0.0)
            hand.seconds = reply.seconds
            for event in reply.events:
                self.listen(event)
            self.deaths_loading, self.alone = 0, False
            if prompt is not None and reply.busy:
                self.queue.append(prompt)
            self.idle.append(hand)

    def _lose(self, hand: _Hand, prompt: PromptRecord | None, error: Exception) -> None:
        """A worker is gone: its prompt is the next to be given out, unless workers keep dying of it."""
        import ray
        from ray.exceptions import ActorDiedError, RayTaskError

        self.hands.remove(hand)
        self._dismiss(hand)
        how = f"{type(error).__name__}: {first_line(error)}"
        if prompt is None:
            self._say(f"worker {hand.number} died while it loaded ({how})")
            self.deaths_loading += 1
            self.not_before = time.monotonic() + PAUSE
            if self.deaths_loading >= TRIES and not any(h.node is not None for h in self.hands):
                raise ScaleRAEError(f"{self.deaths_loading} workers in a row died while they loaded; the last: {how}")
            return
        # Not the prompt's fault where the node died, or may have: it is told of late.
        at_fault = isinstance(error, ActorDiedError | RayTaskError) and any(
            node["NodeID"] == hand.node and node["Alive"] for node in ray.nodes()
        )
        deaths = self.deaths[prompt.index] = self.deaths.get(prompt.index, 0) + at_fault
        if deaths < TRIES:
            self._say(f"worker {hand.number} is gone ({how}); prompt {prompt.index} goes to another")
            self.queue.appendleft(prompt)
            return
        text = f"{deaths} workers died of it; the last: {how}"
        self.store.fail(prompt.index, text, deaths)
        self.listen({"event": "failed", "rank": hand.number, "index": prompt.index, "error": text})

    def _dismiss(self, hand: _Hand) -> None:
        import ray

        with contextlib.suppress(Exception):  # it is gone already, or the cluster is
            ray.kill(hand.actor)

    def _say(self, text: str) -> None:
        self.listen({"event": "say", "text": text})


def _anywhere(name: Any) -> Any:
    """A folder's name that is good in whatever folder a worker is started; other names as they are."""
    from scale_rae.hub import BUNDLED

    if not name or name in BUNDLED or not Path(name).expanduser().exists():
        return name
    return str(Path(name).expanduser().absolute())
