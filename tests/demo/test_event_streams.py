"""The page's requests for events and files, without a browser and a server."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `demo`")
from starlette.responses import FileResponse

from scale_rae.demo import event_streams
from scale_rae.demo.event_streams import EventStreams
from scale_rae.demo.gate import Gate

STREAM = {"type": "http", "path": "/gradio_api/queue/data", "query_string": b"session_hash=one"}
JOIN = {"type": "http", "path": "/gradio_api/queue/join", "query_string": b""}
ENDS = b'data: {"msg":"close_stream"}\n\n'


class Client:
    """One request's client: what it has been sent, and when it leaves."""

    def __init__(self, body: bytes = b"") -> None:
        self.parts: list[bytes] = []
        self.started, self.left = asyncio.Event(), asyncio.Event()
        self._body: list[bytes] = [body]

    async def receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.started.set()
        else:
            self.parts.append(message["body"])


async def gradio(scope: Any, receive: Any, send: Any) -> None:
    """Answers as gradio does when the last event of a session is over."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == STREAM["path"]:
        await send({"type": "http.response.body", "body": b'data: {"msg":"process_completed"}\n\n', "more_body": True})
        await send({"type": "http.response.body", "body": ENDS, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def settled() -> None:
    """Returns when every task waits for something."""
    for _ in range(50):
        await asyncio.sleep(0)


def join(session: str) -> Client:
    return Client(json.dumps({"session_hash": session, "data": ["close_stream"]}).encode())


def test_an_event_is_answered_when_the_page_has_closed_the_stream_that_ends() -> None:
    async def run() -> None:
        app = EventStreams(gradio)
        stream, same, other, odd = Client(), join("one"), join("two"), Client(b"no JSON")
        tasks = [asyncio.create_task(app(STREAM, stream.receive, stream.send))]
        await settled()
        assert stream.parts[-1] == ENDS
        tasks += [asyncio.create_task(app(JOIN, c.receive, c.send)) for c in (same, other, odd)]
        await settled()
        assert not same.started.is_set()
        assert other.started.is_set()
        assert odd.started.is_set()
        stream.left.set()
        await asyncio.gather(*tasks)
        assert same.started.is_set()
        later = join("one")
        await app(JOIN, later.receive, later.send)
        assert later.started.is_set()

    asyncio.run(run())


def test_a_client_that_does_not_close_the_stream_keeps_no_event_waiting_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_streams, "GUARD_SECONDS", 0.01)

    async def run() -> None:
        app = EventStreams(gradio)
        stream, same = Client(), join("one")
        await asyncio.gather(app(STREAM, stream.receive, stream.send), app(JOIN, same.receive, same.send))
        assert same.started.is_set()
        assert stream.parts[-1] == b""

    asyncio.run(run())


def test_a_preview_of_a_removed_upload_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The page asks for the preview of an upload that is refused, and removed, meanwhile."""
    file = tmp_path / "bad.png"
    scope = {
        "type": "http",
        "method": "GET",
        "path": f"/gradio_api/file={file}",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    answers: list[Any] = []

    async def send(message: Any) -> None:
        answers.append(message)

    async def run() -> None:
        client = Client()
        await Gate(FileResponse(file), tmp_path, "127.0.0.1")(scope, client.receive, send)

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert answers[0]["status"] == 404
    assert not caplog.records
