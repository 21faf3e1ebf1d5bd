"""Checks requests before their bodies are parsed: hosts, keys, and the framing, size and time of bodies. No torch.

Library parts do not serve here: FastAPI's HTTPBearer checks a key only after the body is read, and Starlette's TrustedHostMiddleware
reads "[::1]:8000" as the host "[" and looks only at the first Host header.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING

from scale_rae.serve.refusals import Refused, client_left, error_body, internal_error, invalid, shutting_down
from scale_rae.serve.settings import (
    DOCS,
    HEALTH,
    HOME,
    LOOPBACK,
    METRICS,
    OPENAPI,
    PICTURE_FILES,
    READY,
    ServeSettings,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from scale_rae.serve.engine import Engine

OPEN_PATHS = (HOME, HEALTH, READY)  # without a key
NAMED = ("/v1/models/{model}", PICTURE_FILES + "/{name}")  # routes with a name in them
LEFT = "scale_rae.left"  # in a request's scope: whether its client left in the middle of a stream
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+|[0-9a-f:]+)(:\d{1,5})?")
_MARKS = (b",", b"[", b"{")
_log = logging.getLogger("scale_rae.serve")


def known_host(scope: Scope, hosts: Sequence[str] = LOOPBACK) -> bool:
    """Whether a request's Host header, with or without a port, is one of `hosts`.

    A web page can have a name of its own lead to this machine (DNS rebinding); its requests then come with that name.
    A client that sends no Host, which HTTP/1.0 allows, is no browser and is let in.
    """
    given = [value.decode("latin-1").strip().lower() for key, value in scope["headers"] if key == b"host"]

    def is_known(host: str) -> bool:
        match = _HOST.fullmatch(host)
        return host in hosts or (match is not None and match[1].strip("[]") in hosts)

    return all(map(is_known, given))


def client_of(address: str | None) -> str:
    """The name of the client at an address: the address, or the /64 network of IPv6, which one client has to itself."""
    try:
        ip = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return address or ""
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))
    return str(ip)


def check_framing(scope: Scope) -> None:
    """Raises Refused for a body whose end two programs might see in different places (request smuggling)."""
    names = [key for key, _ in scope["headers"]]
    if b"transfer-encoding" in names and (b"content-length" in names or scope.get("http_version") == "1.0"):
        raise Refused(400, "bad_framing", "give either Content-Length or, in HTTP/1.1, Transfer-Encoding")


class Guard:
    """ASGI middleware that checks host, key and body, keeps the metrics, and logs one line per request.

    `routes` are the paths that logs and metrics name, `bodies` those that take a POST with a body. `held` is the number of bytes
    of bodies in memory.
    """

    def __init__(
        self,
        app: ASGIApp,
        engine: Engine,
        settings: ServeSettings,
        routes: Collection[str],
        bodies: Collection[str],
    ) -> None:
        self._app, self._engine, self._settings = app, engine, settings
        self._routes, self._bodies = {*routes, *bodies}, set(bodies)
        self.held = 0
        self._uploads: set[asyncio.Timeout] = set()

    def end_uploads(self) -> None:
        """Refuses the requests whose bodies are still arriving; for a server that shuts down."""
        for limit in self._uploads:
            limit.reschedule(asyncio.get_running_loop().time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start, status, body = time.monotonic(), 0, b""
        name = f"req_{secrets.token_hex(8)}"

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name.encode())]}
            await send(message)

        try:
            try:
                check_framing(scope)
                self._check(scope)
                if scope["method"] == "POST" and scope["path"] in self._bodies:
                    body = await self._body(scope, receive)
                    self._check_items(body)
                # Other routes use no body: theirs is dropped as it arrives.
                await self._app(scope, _replay(body, receive), answer)
            except Refused as e:
                await self._refuse(e, answer)
        except Exception as e:
            self._engine.report(e)
            if not status:
                await self._refuse(internal_error(), answer)
        finally:
            self.held -= len(body)
            route = self._route(scope["path"])
            seconds = time.monotonic() - start
            status = 499 if not status or scope.get(LEFT) else status
            self._engine.metrics.requests.labels(route, str(status)).inc()
            self._engine.metrics.latency.labels(route).observe(seconds)
            if route not in (HEALTH, READY, METRICS):
                _log.info("%s %s %s %d %.0f ms", name, _method(scope), route, status, 1000 * seconds)

    async def _refuse(self, error: Refused, send: Callable[[Message], Awaitable[None]]) -> None:
        headers = error.headers()
        if error.status == 429:
            headers["Retry-After"] = str(self._engine.wait_hint())
        body = json.dumps(error_body(error.status, error.code, str(error), error.field)).encode()
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": error.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})

    def _route(self, path: str) -> str:
        """The path if it is a known one: clients' words must not get into logs and metrics."""
        if path in self._routes:
            return path
        return next((route for route in NAMED if path.startswith(route.partition("{")[0])), "other")

    def _check(self, scope: Scope) -> None:
        headers = {key: value for key, value in scope["headers"] if key == b"authorization"}
        key = self._settings.api_key
        if key is not None:
            # The name of a picture cannot be guessed, so it is the key to it.
            path = scope["path"]
            described = self._settings.docs and path in (DOCS, OPENAPI)  # a browser sends no key for a page
            if path in OPEN_PATHS or described or path.startswith(f"{PICTURE_FILES}/"):
                return
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given.strip(), key.encode()) or scheme.lower() != b"bearer":
                raise Refused(401, "invalid_api_key", "no API key, or a wrong one; send Authorization: Bearer …")
        elif self._settings.host in LOOPBACK and not known_host(scope):
            raise Refused(
                403, "wrong_host", "this server answers to localhost only; behind a proxy, give it an API key"
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body; its bytes stay in `held`."""
        self._engine.check_open()  # before it is read
        most = self._settings.limits.body
        declared = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
        too_large = Refused(413, "body_too_large", f"the body is larger than {most} bytes")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        parts, size, whole = [], 0, False
        try:
            async with asyncio.timeout(self._settings.limits.upload) as limit:
                self._uploads.add(limit)
                try:
                    while True:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise client_left()
                        parts.append(message.get("body", b""))
                        size += len(parts[-1])
                        self.held += len(parts[-1])
                        if size > most:
                            raise too_large
                        if self.held > self._settings.limits.bodies:
                            raise Refused(429, "uploads_full", "too much is being uploaded at once; try again later")
                        if not message.get("more_body"):
                            whole = True
                            return b"".join(parts)
                finally:
                    self._uploads.discard(limit)
        except TimeoutError:
            if self._engine.draining:
                raise shutting_down() from None
            raise Refused(408, "slow_body", "the body took too long to arrive") from None
        finally:
            if not whole:
                self.held -= size

    def _check_items(self, body: bytes) -> None:
        """Raises Refused for a body of very many values, before any of them is parsed.

        Counting bytes takes a hundredth of the time of parsing. Commas and brackets in text count too, so the limit is higher
        by the number of characters that a request may have; the base64 of an image has none.
        """
        limits = self._settings.limits
        if sum(body.count(mark) for mark in _MARKS) > limits.items + limits.prompt:
            raise invalid("body", f"too many values; at most {limits.items} lists, objects and members in a request")


def _method(scope: Scope) -> str:
    """The method if it is one of HTTP's: clients' words must not get into logs."""
    method = str(scope["method"])
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body first, then what `receive` returns."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
