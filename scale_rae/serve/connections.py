"""HTTP/1.1 connections: uvicorn's with h11, limited in number and in the time that a client may take."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from scale_rae.serve.guard import client_of
from scale_rae.serve.refusals import error_body
from scale_rae.serve.settings import Limits

_CHUNK = re.compile(rb"\r\n[0-9A-Fa-f]{1,20}+[^\r\n]{0,64}+\r\n")
_REASONS = {400: "Bad Request", 408: "Request Timeout", 429: "Too Many Requests", 503: "Service Unavailable"}


class Connection(H11Protocol):
    """One connection. `sweep`, which the server calls a few times a second, ends it when its client takes too long.

    `dropped` is called with the reason when a connection is refused or ended: a word for the metrics. The times `head_since`,
    `rest_since` and `unread_since` are None while the client owes nothing of the kind.
    """

    def __init__(self, limits: Limits, dropped: Callable[[str], None], **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._limits, self._dropped = limits, dropped
        self.peer = ""
        self._refused = self._ended = False
        self._chunks = 0
        self.head_since: float | None = None  # the next request's head is awaited or arriving
        self.rest_since: float | None = None  # the rest of an answered request's body is arriving
        self.unread_since: float | None = None  # the client has not taken all that was sent

    # What asyncio calls ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        address = transport.get_extra_info("peername")
        self.peer = client_of(address[0] if isinstance(address, tuple) else None)
        others = Counter(getattr(connection, "peer", "") for connection in self.connections)
        if others.total() >= self._limits.connections:
            self._refuse(transport, 503, "connections_full", "too many connections are open; try again later")
        elif others[self.peer] >= self._limits.connections_each:
            self._refuse(transport, 429, "connections_full", "too many connections of one client are open")
        else:
            self.head_since = time.monotonic()
            super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self._ended:
            return
        # A chunk costs as much time as a request's head, so a body in chunks of one byte would keep the server busy.
        is_head = self.conn.their_state is h11.IDLE
        start = data.find(b"\r\n\r\n") if is_head and b"\n" not in data[:3] else 0  # else the head ends in these bytes
        found = len(_CHUNK.findall(data, start)) if start >= 0 else 0
        self._chunks = found if is_head else self._chunks + found
        if self._chunks > self._limits.chunks:
            self._dropped("chunks")
            self._give_up(400, "too_many_chunks", f"the body comes in more than {self._limits.chunks} chunks")
            return
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0] or self.conn.their_state is not h11.IDLE:
            self._note()
        else:
            self.head_since = self.rest_since = None  # uvicorn's own limit on silence between requests holds

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are not HTTP; uvicorn calls it."""
        self._dropped("not_http")
        self._give_up(400, "bad_request", "the request is not valid HTTP/1.1, or its head is too large")

    # Limits ----------------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Ends the connection if its client has taken too long for something."""
        if not self.transport.get_write_buffer_size():
            self.unread_since = None
        elif self.unread_since is None:
            self.unread_since = now
        if self._ended:
            self.transport.abort()  # it has had the time from one sweep to the next to take its answer
        elif self.head_since is not None and now - self.head_since > self._limits.headers:
            self._dropped("slow_head")
            self._give_up(408, "slow_head", "the request's head took too long to arrive")
        elif self.rest_since is not None and now - self.rest_since > self._limits.upload:
            self._dropped("slow_body")
            self.transport.abort()
        elif self.unread_since is not None and now - self.unread_since > self._limits.deadline:
            self._dropped("slow_reader")
            self.transport.abort()

    def _note(self) -> None:
        """Records since when the client has been sending a head, or the rest of a body."""
        theirs, now = self.conn.their_state, time.monotonic()
        self.head_since = (self.head_since or now) if theirs is h11.IDLE else None
        is_rest = theirs is h11.SEND_BODY and self.cycle is not None and self.cycle.response_complete
        self.rest_since = (self.rest_since or now) if is_rest else None

    def _refuse(self, transport: asyncio.Transport, status: int, code: str, message: str) -> None:
        self._refused = True
        self._dropped(code)
        transport.write(_answer(status, code, message))
        transport.close()

    def _give_up(self, status: int, code: str, message: str) -> None:
        """Closes, with an answer unless a part of one has been sent."""
        if self.cycle is not None and not self.cycle.response_complete:
            answered = self.cycle.response_started
            self.cycle.disconnected = True  # so that the application stops
            self.cycle.message_event.set()
        else:
            answered = False
        if self.transport.is_closing() or answered:
            self.transport.abort()
            return
        self.transport.write(_answer(status, code, message))
        self.transport.close()
        self._ended = True


def _answer(status: int, code: str, message: str) -> bytes:
    """A complete response, as bytes."""
    body = json.dumps(error_body(status, code, message)).encode()
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
