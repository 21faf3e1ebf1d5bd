"""Runs the server from `ServeSettings`: sockets, start, signals, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.serve.app import make_app
from scale_rae.serve.connections import Connection
from scale_rae.serve.decoding import Decoders
from scale_rae.serve.engine import Engine
from scale_rae.serve.settings import Limits, ServeSettings

if TYPE_CHECKING:
    from scale_rae.opening import LoadingBar
    from scale_rae.pipeline import ScaleRAE
    from scale_rae.rewards import Reward

BACKLOG = 128  # connections that wait to be accepted; asyncio accepts up to this many before they are counted
OTHER_FILES = 256 + BACKLOG  # open files of a server besides its connections
_log = logging.getLogger("scale_rae.serve")


def make_engine(settings: ServeSettings, bars: LoadingBar | None = None) -> Engine:
    """An engine that loads the settings' model and rewards when it starts."""

    def load() -> tuple[ScaleRAE, dict[str, Reward]]:
        from scale_rae.opening import OpenedModel
        from scale_rae.rewards import load_reward

        model = OpenedModel(settings.choice, bars, decoder=True, encoder=True, debug=settings.debug).model
        return model, {name: load_reward(name, model, settings.reward_path) for name in settings.rewards}

    return Engine(
        load,
        most_jobs=settings.limits.requests,
        batch_size=settings.batch_size,
        warm_up=settings.warm_up,
        debug=settings.debug,
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        InputError: when the host is not an address of this machine, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as e:
        raise InputError(f"cannot listen on {host} port {port} ({e.strerror or e}); choose another --port") from e


def raise_file_limit(limits: Limits) -> None:
    """Raises the limit of open files of this process to what its connections need.

    Raises:
        InputError: when the system forbids that.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    needed = limits.connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, ValueError) as e:
        raise InputError(
            f"--max-connections {limits.connections}: this process may open only {hard} files; "
            f"choose at most {max(1, hard - OTHER_FILES)}, or raise the limit by `ulimit -n`"
        ) from e


class Server(uvicorn.Server):
    """Uvicorn in front of an engine, and the decoders of the images that clients send.

    After the first SIGTERM or SIGINT the server keeps listening, in order to refuse new requests, until the requests under
    way are done. At the second signal it refuses those too and stops (`cut_short`).
    """

    def __init__(self, engine: Engine, settings: ServeSettings, say: Callable[[str], None] = lambda text: None) -> None:
        self.decoders = Decoders(settings.limits, engine.report)
        self._guard = make_app(engine, settings, self.decoders)
        protocol: Any = functools.partial(Connection, settings.limits, engine.metrics.drop)
        config = uvicorn.Config(
            self._guard,
            http=protocol,  # by default uvicorn may choose httptools, which has no limit on headers
            ws="none",
            lifespan="off",
            access_log=False,  # it has the query and the client's address; the Guard writes its own
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=10,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=settings.limits.head,
            backlog=BACKLOG,
        )
        super().__init__(config)
        self.engine, self._say = engine, say
        self._asked = threading.Event()
        self.cut_short = False
        self._reported = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.cut_short:
            self.should_exit = self.force_exit = True
        self.cut_short = self._asked.is_set()
        self._asked.set()

    def stop(self) -> None:
        """Does what the first SIGTERM does."""
        self._asked.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._loop_error)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._guard.end_uploads()
        self.decoders.close()
        await super().shutdown(sockets)

    def _loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Reports an error outside of requests, at most one per second: some come by the thousand (no more open files)."""
        if (now := time.monotonic()) - self._reported >= 1.0:
            self._reported = now
            error = context.get("exception")
            self.engine.report(error if isinstance(error, BaseException) else RuntimeError())

    async def on_tick(self, counter: int) -> bool:
        engine, now = self.engine, time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.sweep(now)
        if engine.error is not None:
            return True
        if self.cut_short:
            await asyncio.to_thread(engine.abandon)
            return True
        if self._asked.is_set():
            if not engine.draining:
                self._say("shutting down: finishing what runs")
                await asyncio.to_thread(engine.drain)
            self._guard.end_uploads()
            self.decoders.close()
            if engine.idle or not engine.ready.is_set():
                return True
        return await super().on_tick(counter)


def without_texts(engine: Engine) -> Callable[[logging.LogRecord], bool]:
    """A filter for uvicorn's log that leaves errors to `engine.report`, which leaves out their texts.

    Warnings, which are about what clients send, and requests that a signal cuts off are not logged.
    """

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return record.levelno >= logging.ERROR  # the metrics count what warnings are about
        if not isinstance(error, asyncio.CancelledError):
            engine.report(error)
        return False

    return keep


def serve(
    settings: ServeSettings, bars: LoadingBar | None = None, say: Callable[[str], None] = lambda text: None
) -> None:
    """Serves until a signal ends it.

    Raises:
        ScaleRAEError: when the port is taken, or the model cannot be loaded.
    """
    raise_file_limit(settings.limits)
    listener = bind(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    engine = make_engine(settings, bars)
    server = Server(engine, settings, say)
    engine.start()

    def announce() -> None:
        engine.loaded.wait()
        if engine.error is None:
            say(f"{settings.name} on http://{f'[{host}]' if ':' in host else host}:{port}/v1 ({engine.summary()})")

    threading.Thread(target=announce, daemon=True).start()
    log, keep = logging.getLogger("uvicorn.error"), without_texts(engine)
    log.addFilter(keep)
    try:
        with contextlib.closing(listener):
            server.run(sockets=[listener])
    finally:
        log.removeFilter(keep)
    if engine.error is not None:
        raise engine.error
    engine.close()  # Python must not exit while threads compute
    if server.cut_short:
        raise ScaleRAEError("stopped before everything was done")
