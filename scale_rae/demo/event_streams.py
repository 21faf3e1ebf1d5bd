"""Keeps a new event of the page from being lost when the page's stream of results ends at the same moment.

Gradio's server ends a session's stream of results when no event of the session is left. If the page sends an event just then, it
may have the answer before it has read that the stream ends. It then opens no new stream, and shows neither a result nor an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_JOIN, _DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
_LONGEST = 256  # bytes of the message that a stream ends
GUARD_SECONDS = 10.0  # for a client that does not close a stream that has ended


class EventStreams:
    """ASGI middleware that answers an event once the page has closed its session's stream, if that stream has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._ending: dict[str, asyncio.Event] = {}  # by session: set when the page has closed the stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        if path == _DATA:
            await self._stream(scope, receive, send)
        elif path == _JOIN:
            await self._join(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        (session,) = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[:1]
        closed: asyncio.Event | None = None
        last: Message | None = None

        async def sent(message: Message) -> None:
            nonlocal closed, last
            if closed is None and _says_end(message):
                closed = self._ending[session] = asyncio.Event()
            if closed is not None and not message.get("more_body", False):
                last = message  # left out, so that the page's closing of the stream is noticed
            else:
                await send(message)

        try:
            await self._app(scope, receive, sent)
            if last is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GUARD_SECONDS):
                        while (await receive())["type"] != "http.disconnect":
                            pass
                await send(last)
        finally:
            if closed is not None:
                closed.set()
                if self._ending.get(session) is closed:
                    del self._ending[session]

    async def _join(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""

        async def received() -> Message:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and (closed := self._ending.get(_session(body))):
                await closed.wait()
            await send(message)

        await self._app(scope, received, sent)


def _says_end(message: Message) -> bool:
    """Whether a part of a stream tells the page that the stream ends."""
    body = message.get("body", b"")
    if not body.startswith(b"data:") or len(body) > _LONGEST:
        return False
    try:
        return bool(json.loads(body[5:])["msg"] == "close_stream")
    except (ValueError, KeyError, TypeError):
        return False


def _session(body: bytes) -> str:
    """The session that an event belongs to; empty in a body that has none."""
    try:
        return str(json.loads(body)["session_hash"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
