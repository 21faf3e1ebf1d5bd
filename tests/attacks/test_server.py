"""What somebody on the network tries against `scale-rae serve`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from scale_rae.errors import InputError
from scale_rae.pipeline import SamplingOptions, ScaleRAE
from scale_rae.prompt import Turn
from scale_rae.serve import decoding, schema, server
from scale_rae.serve.connections import Connection
from scale_rae.serve.decoding import Decoders
from scale_rae.serve.engine import Engine
from scale_rae.serve.guard import client_of
from scale_rae.serve.jobs import Job
from scale_rae.serve.refusals import Refused
from scale_rae.serve.settings import Limits
from scale_rae.serve.turns import Turns
from tests.serve.conftest import CIRCLE, Running, data_url, serving
from tests.serve.test_limits import CHAT, IMAGES, ask, get, held, post

pytestmark = pytest.mark.attack

KEY = "s3cret-key"
WHITE = data_url(Image.new("RGB", (8, 8), "white"))
HANG = 240.0  # seconds after which a test gives up, however busy the machine is


@pytest.fixture(scope="module")
def shapes() -> ScaleRAE:
    return ScaleRAE.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="module")
def running(shapes: ScaleRAE) -> Iterator[Running]:
    """A server with a key."""
    with serving(shapes, batch_size=1, api_key=KEY) as running:
        yield running


@contextlib.contextmanager
def connected(running: Running, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    address = ("127.0.0.1", running.port)
    with socket.create_connection(address, HANG, source_address=(source, 0)) as connection:
        yield connection


def head(path: str, *headers: str, method: str = "POST", version: str = "1.1") -> bytes:
    lines = (f"{method} {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json", *headers)
    return "\r\n".join((*lines, "", "")).encode()


def read(connection: socket.socket) -> bytes:
    """One response, or all that comes until the server closes."""
    data = b""
    while b"\r\n\r\n" not in data and (more := connection.recv(65536)):
        data += more
    start, _, body = data.partition(b"\r\n\r\n")
    lengths = [line for line in start.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while lengths and len(body) < int(lengths[0].partition(b":")[2]) and (more := connection.recv(65536)):
        body += more
    return start + b"\r\n\r\n" + body


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closes the connection and sends nothing more before it does."""
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


def dropped(running: Running, reason: str) -> float:
    return running.metric("scale_rae_connections_dropped_total", reason=reason)


# Without a key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/nothing"])
def test_a_route_without_a_body_takes_none(running: Running, path: str) -> None:
    key = () if path in ("/health", "/ready") else (f"Authorization: Bearer {KEY}",)
    with connected(running) as connection:
        connection.sendall(head(path, "Content-Length: 1000000", *key) + b"x" * 500_000)
        status = int(read(connection).split()[1])  # at once, though the body is not there
        assert status == (404 if path == "/nothing" else 405)
        assert held(running) == 0


def test_a_key_is_checked_before_a_body_is_read(running: Running) -> None:
    with connected(running) as connection:
        connection.sendall(head(IMAGES, "Content-Length: 1000000", "Authorization: Bearer no") + b"x" * 500_000)
        assert int(read(connection).split()[1]) == 401
        assert held(running) == 0


@pytest.mark.parametrize(
    ("version", "framing"),
    [
        ("1.1", ("Content-Length: 4", "Transfer-Encoding: chunked")),
        ("1.1", ("Transfer-Encoding: chunked", "Content-Length: 0")),
        ("1.0", ("Transfer-Encoding: chunked",)),
    ],
)
def test_a_body_with_two_ends_is_refused(running: Running, version: str, framing: tuple[str, ...]) -> None:
    smuggled = head("/health", method="GET")
    with connected(running) as connection:
        message = head(IMAGES, f"Authorization: Bearer {KEY}", *framing, version=version)
        connection.sendall(message + b"0\r\n\r\n" + smuggled)
        answer = read(connection)
        assert int(answer.split()[1]) == 400
        assert b"connection: close" in answer.lower()
        assert is_closed(connection)


def test_there_are_only_so_many_connections(shapes: ScaleRAE) -> None:
    with serving(shapes, batch_size=1, limits=Limits(connections=3)) as running, contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(connected(running)) for _ in range(3)]
        for one in open_ones:
            one.sendall(b"GET /health HTTP/1.1\r\nHost:")  # and no more
        running.wait_for(lambda: len(running.server.server_state.connections) == 3)
        with connected(running) as one_more:
            assert int(read(one_more).split()[1]) == 503
            assert is_closed(one_more)
        assert dropped(running, "connections_full") == 1
        open_ones[0].close()
        running.wait_for(lambda: len(running.server.server_state.connections) == 2)
        assert get(running.url + "/health")[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is there on Linux only")
def test_one_client_does_not_take_all_connections(shapes: ScaleRAE) -> None:
    with serving(shapes, batch_size=1, limits=Limits(connections_each=3)) as running, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connected(running)).sendall(b"G")
        running.wait_for(lambda: len(running.server.server_state.connections) == 3)
        with connected(running) as one_more:
            assert int(read(one_more).split()[1]) == 429
        with connected(running, "127.0.0.2") as another:
            another.sendall(head("/health", method="GET"))
            assert int(read(another).split()[1]) == 200


def test_addresses_of_one_client_count_together() -> None:
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:1") != client_of("2001:db8:0:1::1")
    assert client_of("::ffff:192.0.2.1") == client_of("192.0.2.1") != client_of("192.0.2.2")
    assert client_of("fe80::1%eth0") == client_of("fe80::2%eth1")
    assert client_of(None) == ""


def connections(running: Running) -> list[Connection]:
    return [one for one in running.server.server_state.connections.copy() if isinstance(one, Connection)]


def sweep(running: Running, seconds: float) -> None:
    """What the server will do with its connections in so many seconds."""
    loop = running.server.servers[0].get_loop()
    for connection in connections(running):
        loop.call_soon_threadsafe(connection.sweep, time.monotonic() + seconds)


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nHost: local", head("/health", method="GET") + b"GE"])
def test_a_head_has_to_arrive_in_time(shapes: ScaleRAE, start: bytes) -> None:
    """Of the first request, also if not a byte comes; of the next. More bytes now and then give no more time."""
    limits = Limits(headers=1000)
    with serving(shapes, batch_size=1, limits=limits) as running, connected(running) as connection:
        connection.sendall(start)
        answers = b""
        while answers.count(b'{"status"') < start.count(b"\r\n\r\n"):
            answers += connection.recv(65536)
        running.wait_for(lambda: [one.head_since for one in connections(running)] not in ([], [None]))
        (before,) = [one.head_since for one in connections(running)]
        if start:
            connection.sendall(b"x")
            (one,) = connections(running)
            running.wait_for(lambda: one.conn.trailing_data[0].endswith(b"x"))
            assert one.head_since == before
        sweep(running, 999)
        running.wait_for(lambda: len(connections(running)) == 1)
        sweep(running, 1001)
        while more := connection.recv(65536):
            answers += more
        assert answers.count(b"HTTP/1.1 200 ") == start.count(b"\r\n\r\n")
        assert b"HTTP/1.1 408 " in answers
        assert dropped(running, "slow_head") == 1
        running.wait_for(lambda: not connections(running))


def test_what_is_left_of_a_refused_body_has_to_arrive_in_time(running: Running) -> None:
    before = dropped(running, "slow_body")
    with connected(running) as connection:
        connection.sendall(head("/health", "Content-Length: 1000000") + b"x" * 1000)
        assert b" 405 " in read(connection)
        running.wait_for(lambda: any(one.rest_since for one in connections(running)))
        sweep(running, 31)
        assert is_closed(connection)
    assert dropped(running, "slow_body") == before + 1


@pytest.mark.parametrize("header", [b"X: " + b"y" * 100_000, b"\r\n".join([b"a:b"] * 20_000)])
def test_a_head_has_a_limit(running: Running, header: bytes) -> None:
    with connected(running) as connection:
        with contextlib.suppress(OSError):  # it closes in the middle
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + header)
        with contextlib.suppress(ConnectionResetError):
            assert b" 400 " in read(connection)
    assert get(running.url + "/health")[0] == 200


def test_the_parser_is_the_one_that_the_limits_are_for(running: Running) -> None:
    """Whatever else is installed."""
    protocol: Any = running.server.config.http_protocol_class
    assert protocol.func is Connection
    assert running.server.config.ws_protocol_class is None


def test_a_body_of_very_many_chunks(running: Running) -> None:
    before = dropped(running, "chunks")
    with connected(running) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(head(IMAGES, f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked"))
            for _ in range(100):
                connection.sendall(b"1\r\nx\r\n" * 1000)
        with contextlib.suppress(ConnectionResetError):
            assert b"too_many_chunks" in read(connection)
    running.wait_for(lambda: dropped(running, "chunks") == before + 1)


def test_a_client_that_does_not_read(running: Running) -> None:
    with connected(running) as connection:
        connection.settimeout(0.1)
        with contextlib.suppress(OSError):  # both sides' buffers fill up
            for _ in range(2000):
                connection.sendall(head("/openapi.json", f"Authorization: Bearer {KEY}", method="GET") * 10)
        running.wait_for(lambda: any(one.unread_since for one in connections(running)))
        sweep(running, 301)
        running.wait_for(lambda: dropped(running, "slow_reader") == 1)
        running.wait_for(lambda: not connections(running))


def test_garbage_in_the_middle_of_an_answer(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": CIRCLE}], "steps": 250, "n": 4, "stream": True})
    chunk = f"{len(body):x}\r\n{body}\r\n0\r\n\r\n"
    with connected(running) as connection:
        connection.sendall(head(CHAT, f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked") + chunk.encode())
        assert b" 200 " in connection.recv(4096)
        connection.sendall(b"\x00\x01 garbage\r\n\r\n" * 100)
    running.wait_idle()
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_what_clients_send_does_not_fill_the_log() -> None:
    keep = server.without_texts(Engine(lambda: (None, {})))
    warning = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, "Invalid HTTP request received.", (), None)
    assert not keep(warning)
    warning.levelno = logging.ERROR
    assert keep(warning)


def test_errors_of_the_event_loop_do_not_fill_the_log(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """As when there are no more files to open, which asyncio says thousands of times."""
    loop = running.server.servers[0].get_loop()
    done = threading.Event()

    def storm() -> None:
        for _ in range(1000):
            loop.call_exception_handler({"message": "out of system resource", "exception": OSError(24, "EMFILE")})
        done.set()

    loop.call_soon_threadsafe(storm)
    assert done.wait(HANG)
    assert 1 <= caplog.text.count("OSError") < 10


def test_there_are_files_enough_for_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    allowed = [256, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(allowed))

    def allow(kind: int, wanted: tuple[int, int]) -> None:
        if wanted[0] > allowed[1]:
            raise ValueError
        allowed[:] = wanted

    monkeypatch.setattr(resource, "setrlimit", allow)
    server.raise_file_limit(Limits(connections=1000))
    assert allowed[0] > 1000
    with pytest.raises(InputError, match="--max-connections 9000: this process may open only 4096 files"):
        server.raise_file_limit(Limits(connections=9000))


# With a key --------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "hi"}
PART = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [5] * 200_000},
        {"messages": [USER | {"content": [PART] * 100_000}]},
        {"messages": [USER], "metadata": {str(i): i for i in range(100_000)}},
        {"messages": [USER], "stop": [[]] * 100_000},
    ],
    ids=["wrong items", "harmless parts", "members", "lists"],
)
def test_a_body_of_very_many_values_is_not_even_parsed(
    running: Running, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scale_rae.serve.routes.body.parse_json", lambda *_, **__: pytest.fail("is parsed"))
    status, answer, _ = post(running.url + CHAT, body, {"Authorization": f"Bearer {KEY}"})
    assert status == 400
    assert "too many values" in answer["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [5] * 20_000},
        {"messages": [USER | {"content": [5] * 20_000}]},
        {"messages": [USER | {"content": [PART] * 20_000}]},
        {"messages": [USER, {"role": "assistant", "images": [{}] * 20_000}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [{}] * 20_000}]},
        {"messages": [{"role": "user", **{str(i): i for i in range(20_000)}}]},
        {"messages": [USER], "modalities": ["x"] * 20_000},
        {"messages": [USER], "metadata": {str(i): i for i in range(20_000)}},
        {"messages": [USER], "logit_bias": {str(i): i for i in range(20_000)}},
        {str(i): i for i in range(20_000)},
    ],
    ids=lambda body: str(body)[:50],
)
def test_a_wrong_request_makes_few_errors_however_long_it_is(body: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        schema.ChatRequest.model_validate(body)
    assert caught.value.error_count() <= 4


def test_numbers_of_very_many_digits(running: Running) -> None:
    body = b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}"
    status, answer, _ = post(running.url + IMAGES, body, {"Authorization": f"Bearer {KEY}"})
    assert (status, answer["error"]["param"]) == (400, "body")


def test_text_of_nothing_but_marks_is_still_text(running: Running) -> None:
    """The bound on values takes no prompt away that the bound on text allows."""
    body = {"messages": [USER | {"content": ",[{" * 5_333}], "max_tokens": 1}
    status, answer, _ = post(running.url + CHAT, body, {"Authorization": f"Bearer {KEY}"})
    assert status in (200, 400)
    assert "too many values" not in json.dumps(answer)


def test_a_stream_whose_client_leaves_leaves_nothing_behind(running: Running) -> None:
    loop = running.server.servers[0].get_loop()
    running.wait_idle()
    running.wait_for(lambda: not running.server.server_state.tasks)
    before = len(asyncio.all_tasks(loop))
    body = json.dumps({"messages": [{"role": "user", "content": CIRCLE}], "steps": 250, "n": 8, "stream": True})
    for wait_for_start in (True, False):
        with connected(running) as connection:
            request = head(CHAT, f"Authorization: Bearer {KEY}", f"Content-Length: {len(body)}") + body.encode()
            connection.sendall(request)
            if wait_for_start:
                assert b" 200 " in connection.recv(4096)
        running.wait_idle()
        running.wait_for(lambda: len(asyncio.all_tasks(loop)) <= before)


def test_a_slow_upload_does_not_keep_a_server_that_shuts_down(shapes: ScaleRAE) -> None:
    limits = Limits(upload=10_000, headers=10_000)
    with serving(shapes, batch_size=1, limits=limits) as running, connected(running) as idle, connected(running) as one:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost:")
        one.sendall(head(IMAGES, "Content-Length: 1000") + b"{" * 500)
        running.wait_for(lambda: held(running) == 500)
        running.server.stop()
        answer = read(one)
        assert b" 503 " in answer
        assert b"shutting_down" in answer
        running.thread.join(HANG)
        assert not running.thread.is_alive()


# Many requests of one client ---------------------------------------------------------------------------------------


def test_clients_take_turns() -> None:
    turns = Turns()
    waiting = ["a1", "a2", "a3", "b1", "c1", "c2"]
    client = lambda item: item[0]  # noqa: E731
    assert turns.order(waiting, client) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    turns.serve(["a"])
    assert turns.order(waiting[1:], client)[0] == "b1"
    turns.serve(["b", "c"])
    assert turns.order(["c2", "a2", "a3", "d1"], client) == ["d1", "a2", "c2", "a3"]
    assert turns.order(["a1", "a2", "a3"], client) == ["a1", "a2", "a3"]  # nothing is otherwise for one alone
    turns.keep(["c"])
    assert turns.order(["c2", "a2"], client) == ["a2", "c2"]


def test_one_clients_many_requests_do_not_keep_another_waiting(shapes: ScaleRAE) -> None:
    engine = Engine(lambda: (shapes, {}), batch_size=2)
    ended: list[str] = []
    over = threading.Event()

    def job(client: str, name: str, count: int) -> Job:
        def emit(event: Any) -> None:
            if not isinstance(event, str):
                ended.append(name)
                if len(ended) == 7:
                    over.set()

        asked = [Turn("user", CIRCLE)]
        deadline = time.monotonic() + 600
        return Job(asked, None, SamplingOptions(steps=2), 0, emit, deadline, count=count, best_of=count, client=client)

    engine.start()
    assert engine.loaded.wait(HANG)
    try:
        greedy = [job("greedy", f"greedy {i}", 2) for i in range(6)]
        engine.submit(*greedy, job("honest", "honest", 1))  # all are there before the first is begun
        assert over.wait(4 * HANG)
    finally:
        engine.close()
    assert ended.index("honest") <= 2  # of 6, after what one round of each stage takes


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is there on Linux only")
def test_clients_are_known_by_their_address(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def submit(job: Job) -> None:
        seen.append(job.client)
        raise Refused(429, "queue_full", "no")

    monkeypatch.setattr(running.engine, "submit", submit)
    body = json.dumps({"prompt": CIRCLE}).encode()
    for source in ("127.0.0.1", "127.0.0.2"):
        with connected(running, source) as connection:
            message = head(IMAGES, f"Authorization: Bearer {KEY}", f"Content-Length: {len(body)}") + body
            connection.sendall(message)
            assert b" 429 " in read(connection)
    assert seen == ["127.0.0.1", "127.0.0.2"]


# Images ------------------------------------------------------------------------------------------------------------

# Decoders that do what a hostile image might make one of C do; `mark` stands in the field's base64.
HOSTILE = """
import sys; sys.path += sys.argv[1:]
import json, os, time
from scale_rae.errors import InputError
from scale_rae.serve import decoding, data_urls
honest = data_urls.read_data_url
def read(url, *rest):
    if "HANG" in url:
        while True: time.sleep(1)
    if "CRASH" in url:
        os.abort()
    if "MEMORY" in url:
        return bytearray(1 << 40)
    if "TALK" in url:
        os.write(1, b"x" * 100)
    if "STATE" in url:
        wrong = [name for name in ("torch", "fastapi") if name in sys.modules]
        raise InputError(json.dumps([wrong, sorted(os.environ), os.getcwd() in sys.path or "" in sys.path]))
    return honest(url.replace("TALK", ""), *rest)
data_urls.read_data_url = read
decoding.main()
"""


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PROGRAM", HOSTILE)
    monkeypatch.setenv("SCALE_RAE_API_KEY", KEY)


def pids(running: Running) -> list[int]:
    return running.server.decoders.processes


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def url_of(mark: str) -> str:
    return f"data:image/png;base64,{mark}"


def looked(running: Running) -> int:
    """The status of a request with an honest image."""
    return post(running.url + CHAT, ask(WHITE) | {"max_tokens": 1, "modalities": ["text"]})[0]


def test_an_image_that_takes_too_long(shapes: ScaleRAE, hostile: None) -> None:
    with serving(shapes, batch_size=1, limits=Limits(quick=0.1, decoding=0.2)) as running:
        status, answer, _ = post(running.url + CHAT, ask(url_of("HANG")))
        assert status == 400
        assert "takes more than 0.2 s to decode" in answer["error"]["message"]
        assert answer["error"]["param"] == "messages.0.content.1.image_url.url"
        running.wait_for(lambda: not pids(running))


def test_an_image_that_ends_its_decoder(shapes: ScaleRAE, hostile: None) -> None:
    with serving(shapes, batch_size=1, limits=Limits(quick=1000, decoding=1000, decoders=1)) as running:
        for mark, said in (("CRASH", "is damaged or cannot be read"), ("MEMORY", "needs too much memory")):
            status, answer, _ = post(running.url + CHAT, ask(url_of(mark)))
            assert status == 400
            assert said in answer["error"]["message"]
            assert answer["error"]["param"] == "messages.0.content.1.image_url.url"
        assert looked(running) == 200  # by a new process
        assert post(running.url + CHAT, ask(WHITE + "TALK") | {"max_tokens": 1})[0] == 200
        workers = pids(running)
    assert not any(map(is_alive, workers))


def test_a_decoder_has_nothing_of_the_servers(shapes: ScaleRAE, hostile: None) -> None:
    with serving(shapes, batch_size=1, limits=Limits(quick=1000, decoding=1000)) as running:
        said = post(running.url + CHAT, ask(url_of("STATE")))[1]["error"]["message"]
        modules, environment, is_here = json.loads(said)
        assert modules == []
        assert not any("KEY" in name or "TOKEN" in name for name in environment)
        assert not is_here


@pytest.mark.parametrize("how", ["leaves", "deadline", "shutdown"])
def test_a_decoder_ends_with_its_request(shapes: ScaleRAE, hostile: None, how: str) -> None:
    limits = Limits(quick=10_000, decoding=10_000, deadline=2.0 if how == "deadline" else 10_000)
    with serving(shapes, batch_size=1, limits=limits) as running, connected(running) as connection:
        body = json.dumps(ask(url_of("HANG"))).encode()
        connection.sendall(head(CHAT, f"Content-Length: {len(body)}") + body)
        if how == "deadline":
            assert b" 504 " in read(connection)
        else:
            running.wait_for(lambda: len(pids(running)) == 1)
        workers = pids(running)
        if how == "leaves":
            assert looked(running) == 200  # nobody waits behind it
            connection.close()
        elif how == "shutdown":
            running.server.stop()
            assert b" 503 " in read(connection)
        running.wait_for(lambda: not any(map(is_alive, workers)))
        if how == "leaves":
            assert looked(running) == 200


def test_images_that_take_for_ever_do_not_keep_others_waiting(hostile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[asyncio.Timeout, float]] = []
    monkeypatch.setattr(decoding, "end_in", lambda limit, seconds: begun.append((limit, seconds)))

    async def crowd() -> None:
        decoders = Decoders(Limits(quick=3000, decoding=9000, decoders=2), lambda error: None)

        def look(url: str, client: str) -> asyncio.Task[tuple[int, int]]:
            return asyncio.create_task(decoders.read(url, "url", client, lambda image: image.size))

        async def expire(count: int, *which: int) -> None:
            """Ends the time of some first tries, once `count` tries of images have begun."""
            while len(begun) < count:
                await asyncio.sleep(0.005)
            for index in which:
                assert begun[index][1] == 3000
                begun[index][0].reschedule(asyncio.get_running_loop().time())

        async with asyncio.timeout(HANG):
            greedy = [look(url_of("HANG"), "greedy") for _ in range(4)]
            await asyncio.sleep(0)
            honest = look(WHITE, "honest")  # the last to come
            await expire(2, 0)
            assert await honest == (8, 8)
            await expire(4, 1, 3)  # the second and third first try of the greedy one
            while len(begun) < 6:
                await asyncio.sleep(0.005)
            (first,) = [index for index in (4, 5) if begun[index][1] == 3000]  # and one that had its first try
            await expire(6, first)
            for client in ("honest", "greedy"):
                assert await look(WHITE, client) == (8, 8)  # one decoder is left for first tries
            assert decoders.slow == 1
            assert not any(task.done() for task in greedy)
            greedy[0].cancel()
            await asyncio.wait(greedy[:1])
            assert await look(WHITE, "honest") == (8, 8)
        decoders.close()
        ended = await asyncio.gather(*greedy, return_exceptions=True)
        assert [type(error) for error in ended] == [asyncio.CancelledError, Refused, Refused, Refused]

    asyncio.run(crowd())


def test_an_image_that_waits_for_a_thread_is_refused_at_shutdown(
    hostile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No decoder starts for it, and its request is not cancelled. On a busy machine, a thread takes its next image late."""
    monkeypatch.setattr(decoding, "ThreadPoolExecutor", lambda count, **names: ThreadPoolExecutor(1, **names))
    begun: list[float] = []
    monkeypatch.setattr(decoding, "end_in", lambda limit, seconds: begun.append(seconds))

    async def crowd() -> None:
        decoders = Decoders(Limits(quick=3000, decoding=9000, decoders=2), lambda error: None)
        looks = [decoders.read(url_of("HANG"), "url", client, lambda image: image.size) for client in "ab"]
        tasks = [asyncio.create_task(look) for look in looks]
        async with asyncio.timeout(HANG):
            while not begun:
                await asyncio.sleep(0.005)
            decoders.close()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [(type(error), getattr(error, "status", None)) for error in ended] == [(Refused, 503)] * 2
        assert decoders.processes == []

    asyncio.run(crowd())


def test_a_large_image_in_a_body_of_its_own_size(running: Running) -> None:
    """The bounds take nothing away from honest clients: 4000 x 4000 pixels."""
    image = data_url(Image.new("RGB", (4000, 4000), "red"), "PNG")
    body = ask(image) | {"max_tokens": 1, "modalities": ["text"]}
    assert post(running.url + CHAT, body, {"Authorization": f"Bearer {KEY}"})[0] == 200


def test_no_request_blocks_the_others(running: Running) -> None:
    """While a large upload is under way, probes are answered."""
    with connected(running) as connection, ThreadPoolExecutor(1) as pool:
        size = 20 << 20
        connection.sendall(head(CHAT, f"Authorization: Bearer {KEY}", f"Content-Length: {size}"))
        connection.sendall(b'{"x": "' + b"a" * (size // 2))
        assert pool.submit(urllib.request.urlopen, running.url + "/health", None, HANG).result().status == 200
        connection.sendall(b"a" * (size - size // 2 - 9) + b'"}')
        assert b" 400 " in read(connection)
