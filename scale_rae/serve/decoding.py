"""Decodes images from clients in processes that can be killed, since nothing else stops a decoder written in C.

A worker process has no torch and no secrets from the server's environment; its memory and time are limited. It reads a data URL and
writes pixels, in frames of a fixed form; nothing that it writes is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from PIL import Image

from scale_rae.errors import InputError
from scale_rae.serve.refusals import Refused, shutting_down
from scale_rae.serve.settings import Limits
from scale_rae.serve.turns import Turns

T = TypeVar("T")

_QUESTION = struct.Struct(">IIQI")  # bytes of the field's name and of the URL, most pixels, seconds
_ANSWER = struct.Struct(">BIIQ")  # kind, width, height, bytes that follow
_IMAGE, _ERROR, _MEMORY = range(3)
_READY = b"ready"
_MEMORY_BASE, _MEMORY_PER_PIXEL = 768 << 20, 64  # of each pixel there are a few copies, of 4 bytes at most
_ROOT = str(Path(__file__).parents[2])
# -I: modules come neither from the working folder nor from where environment variables say.
PROGRAM = "import sys; sys.path += sys.argv[1:]; from scale_rae.serve.decoding import main; main()"
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP")


class Decoders:
    """Reads data URLs in worker processes, which start when they are first needed.

    Clients take turns. An image that takes longer than `Limits.quick` is stopped. It begins again when no image waits for a
    first try and another worker stays free for new images, so that a slow image delays the rest by a few seconds only.
    """

    def __init__(self, limits: Limits, report: Callable[[BaseException], None]) -> None:
        self._limits, self._report = limits, report
        self._threads = ThreadPoolExecutor(limits.decoders, thread_name_prefix="decoder")
        self._all = [_Worker() for _ in range(limits.decoders)]
        self._free = list(self._all)
        self._waiting: list[_Waiting] = []
        self.slow = 0  # workers that have a slow image
        self._turns = Turns()
        self._clients: Counter[str] = Counter()  # of images that wait or are decoded
        self._closed = False

    async def read(self, url: str, field: str, client: str, then: Callable[[Image.Image], T]) -> T:
        """What `then` returns, on another thread, for the image in a data URL.

        When this is cancelled, as at the end of its request's time, the decoder is killed.

        Raises:
            Refused: naming the field, when the URL holds no image or takes too long; when the server shuts down.
        """
        self._clients[client] += 1
        try:
            return await self._try(url, field, client, then)
        finally:
            self._clients[client] -= 1
            self._clients += Counter()  # drops clients at zero
            self._turns.keep(self._clients)

    async def _try(self, url: str, field: str, client: str, then: Callable[[Image.Image], T]) -> T:
        limits = self._limits
        for is_slow, seconds in ((False, min(limits.quick, limits.decoding)), (True, limits.decoding)):
            worker = await self._take(client, is_slow)
            if self._closed:
                raise shutting_down()
            loop = asyncio.get_running_loop()
            limit = asyncio.timeout(None)

            # The clock starts when the process has started.
            started = functools.partial(loop.call_soon_threadsafe, end_in, limit, seconds)
            work = loop.run_in_executor(self._threads, self._read, worker, url, field, seconds, started, then)
            work.add_done_callback(functools.partial(self._give_back, worker, is_slow))
            try:
                async with limit:
                    return await asyncio.shield(work)
            except TimeoutError:
                pass
            finally:
                if not work.done():  # else the worker is in use for another image by now
                    worker.end()
        said = f"{field}: the image takes more than {limits.decoding:g} s to decode; send a simpler one"
        raise Refused(400, "invalid_image", said, field)

    def close(self) -> None:
        """Kills the workers and refuses the images that wait."""
        self._closed = True
        for waits in self._waiting:
            if not waits.turn.done():
                waits.turn.set_exception(shutting_down())
        self._waiting.clear()
        for worker in self._all:
            worker.close()
        self._threads.shutdown(wait=False)  # an image that waits for a thread finds its worker closed

    @property
    def processes(self) -> list[int]:
        """The ids of the workers that run."""
        return [pid for worker in self._all if (pid := worker.pid) is not None]

    # Turns -----------------------------------------------------------------------------------------------------------

    async def _take(self, client: str, is_slow: bool) -> _Worker:
        """A free worker, at the client's turn."""
        if self._closed:
            raise shutting_down()
        waits = _Waiting(client, is_slow, asyncio.get_running_loop().create_future())
        self._waiting.append(waits)
        self._hand_out()
        try:
            return await waits.turn
        except asyncio.CancelledError:
            if waits in self._waiting:
                self._waiting.remove(waits)
            elif not waits.turn.cancelled() and waits.turn.exception() is None:
                self._put_back(waits.turn.result(), is_slow)
            raise

    def _hand_out(self) -> None:
        """Gives free workers to waiting images; slow images never get all of them."""
        most_slow = max(1, len(self._all) - 1)
        for is_slow in (False, True):
            waiting = [waits for waits in self._waiting if waits.is_slow == is_slow and not waits.turn.done()]
            for waits in self._turns.order(waiting, lambda waits: waits.client):
                if not self._free or self._closed or (is_slow and self.slow >= most_slow):
                    break
                self._waiting.remove(waits)
                self.slow += is_slow
                self._turns.serve([waits.client])
                waits.turn.set_result(self._free.pop())

    def _give_back(self, worker: _Worker, is_slow: bool, done: asyncio.Future[Any]) -> None:
        if not done.cancelled():
            done.exception()  # marks it as seen; the request has raised it, unless the request is over
        self._put_back(worker, is_slow)

    def _put_back(self, worker: _Worker, is_slow: bool) -> None:
        self._free.append(worker)
        self.slow -= is_slow
        self._hand_out()

    # On a thread -----------------------------------------------------------------------------------------------------

    def _read(
        self,
        worker: _Worker,
        url: str,
        field: str,
        seconds: float,
        started: Callable[[], object],
        then: Callable[[Image.Image], T],
    ) -> T:
        try:
            image = worker.read(url, field, self._limits.pixels, seconds, started)
        except InputError as e:
            raise Refused(400, "invalid_image", str(e), field) from None
        except _EndedError as e:
            if self._closed:
                raise shutting_down() from None
            if not e.on_purpose:
                self._report(e)
            raise Refused(400, "invalid_image", f"{field}: the image is damaged or cannot be read", field) from None
        return then(image)


@dataclass(eq=False)
class _Waiting:
    """An image that waits for a worker."""

    client: str
    is_slow: bool  # whether it has been tried once
    turn: asyncio.Future[_Worker]


class _EndedError(Exception):
    """A worker process that ended in the middle of an image."""

    def __init__(self, on_purpose: bool) -> None:
        super().__init__()
        self.on_purpose = on_purpose


class _Worker:
    """One process, replaced when it has ended. One thread at a time calls `read`; any thread calls `end` and `close`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._busy = self._ended = self._closed = False

    @property
    def pid(self) -> int | None:
        """The process's id; None before it starts and after its end."""
        process = self._process
        return None if process is None else process.pid

    def read(self, url: str, field: str, pixels: int, seconds: float, started: Callable[[], object]) -> Image.Image:
        """The image in a data URL.

        Raises:
            InputError: when the URL holds no image.
            _EndedError: when the process ended instead of answering, or the worker is closed.
        """
        with self._lock:
            if self._closed:
                raise _EndedError(on_purpose=True)
            self._busy, self._ended = True, False
        try:
            return self._ask(url, field, pixels, seconds, started)
        except (OSError, EOFError) as e:
            with self._lock:
                self._busy = False
            self.end(on_purpose=False)
            raise _EndedError(self._ended) from e
        finally:
            with self._lock:
                self._busy = False

    def end(self, on_purpose: bool = True) -> None:
        """Kills the process; a `read` in progress raises."""
        with self._lock:
            self._ended = self._ended or (self._busy and on_purpose)
            process, self._process = self._process, None
            idle = not self._busy
        if process is not None:
            process.kill()
            process.wait()
            if idle:  # else `read`, which uses the pipes now, closes them
                _close(process)

    def close(self) -> None:
        """Kills the process and starts no other."""
        with self._lock:
            self._closed = True
        self.end()

    def _ask(self, url: str, field: str, pixels: int, seconds: float, started: Callable[[], object]) -> Image.Image:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start(_MEMORY_BASE + _MEMORY_PER_PIXEL * pixels)
        assert process.stdin is not None
        assert process.stdout is not None
        started()
        name, data = field.encode(), url.encode("utf-8", "surrogatepass")
        process.stdin.write(_QUESTION.pack(len(name), len(data), pixels, math.ceil(seconds) + 5))
        process.stdin.write(name)
        process.stdin.write(data)
        process.stdin.flush()
        kind, width, height, size = _ANSWER.unpack(_exactly(process.stdout, _ANSWER.size))
        if (kind == _IMAGE and size != 3 * width * height) or size > 3 * pixels + 4096:
            raise EOFError
        data = _exactly(process.stdout, size)
        if kind == _IMAGE:
            return Image.frombytes("RGB", (width, height), data)
        if kind == _MEMORY:
            raise InputError(f"{field}: the image needs too much memory to decode; send a simpler one")
        raise InputError(data.decode("utf-8", "replace"))

    def _start(self, memory: int) -> subprocess.Popen[bytes]:
        here = Path.cwd()
        folders = [path for path in sys.path if Path(path).is_absolute() and Path(path) != here]
        command = [sys.executable, "-I", "-c", PROGRAM, *folders, _ROOT]
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "SCALE_RAE_DECODER_MEMORY": str(memory)}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries write there, also about what clients sent
            env=environment,
            cwd="/" if os.name == "posix" else None,
            start_new_session=True,  # so that Ctrl-C reaches the server only; on Windows, the flag does that
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        with self._lock:
            self._process = process
            ended = self._ended
        if ended:
            self.end()
        assert process.stdout is not None
        if _exactly(process.stdout, len(_READY)) != _READY:
            raise EOFError
        return process


def end_in(limit: asyncio.Timeout, seconds: float) -> None:
    with contextlib.suppress(RuntimeError):  # the block has ended already
        limit.reschedule(asyncio.get_running_loop().time() + seconds)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # closing flushes
            if pipe is not None:
                pipe.close()


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


# In the process -----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Answers questions on stdin until it ends."""
    from scale_rae.serve.data_urls import read_data_url

    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print do not write among the answers
    _limit_memory(int(os.environ["SCALE_RAE_DECODER_MEMORY"]))
    has_clock = hasattr(signal, "setitimer")
    answers.write(_READY)
    answers.flush()
    while len(head := questions.read(_QUESTION.size)) == _QUESTION.size:
        name_size, url_size, pixels, seconds = _QUESTION.unpack(head)
        name = questions.read(name_size).decode()
        url = questions.read(url_size).decode("utf-8", "surrogatepass")
        if has_clock:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process even when the server has died
        size, data = (0, 0), b""
        try:
            image = read_data_url(url, name, pixels)
            kind, size, data = _IMAGE, image.size, image.tobytes()
        except InputError as e:
            kind, data = _ERROR, str(e).encode("utf-8", "replace")[:4096]
        except MemoryError:  # of what stands around the decoder, which reports its own: base64, and the pixels as bytes
            kind = _MEMORY
        if has_clock:
            signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(_ANSWER.pack(kind, *size, len(data)))
        answers.write(data)
        answers.flush()


def _limit_memory(most: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows and macOS have no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
