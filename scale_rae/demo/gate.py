"""Checks every HTTP request before it reaches the page: host, origin, route, file, size. Independent of gradio."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect

from scale_rae.demo.limits import LARGEST_FILE
from scale_rae.serve.guard import known_host
from scale_rae.serve.settings import LOOPBACK

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger("scale_rae.demo")

MOST_UPLOADED = 2 << 30  # bytes that the page's folder may hold; the next upload is refused
_LARGEST_BODY = 1 << 20  # of other requests: fields and a conversation
BODY_SECONDS = 120.0  # for a body to arrive

# What the page's own script asks for. Gradio has more routes: for proxies, for programs, for editing the page.
_API = "/gradio_api"
_GET = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)|/(assets|static|svelte)/.*|"
    rf"{_API}/(app_id|info|startup-events|theme\.css|queue/data|queue/status|upload_progress|heartbeat/[^/]+|file=.*)"
)
_POST = re.compile(rf"{_API}/(queue/join|run/predict|cancel|upload|reset)/?")
_UPLOAD = f"{_API}/upload"
_FILE = f"{_API}/file="
_NO_FILE = (404, "no such file")
_ADDED = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
]


class Gate:
    """ASGI middleware that lets through only what a browser sends that shows the page.

    `folder` has the files that the page serves. `host` is the address that it listens at; `names` are its other names, such as
    that of a reverse proxy.
    """

    def __init__(self, app: ASGIApp, folder: Path, host: str, names: Sequence[str] = ()) -> None:
        self._app, self._folder = app, Path(os.path.realpath(folder))
        self._names = tuple(name.lower() for name in names)
        self._hosts = (*LOOPBACK, *self._names)
        self._open = host not in LOOPBACK
        if self._open:
            self._hosts += (host.lower(), socket.gethostname().lower(), socket.getfqdn().lower())
        self._arriving = 0  # bytes of uploads under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        size = _length(scope) or 0 if scope["path"].startswith(_UPLOAD) else 0
        self._arriving += size
        try:
            await self._pass(scope, receive, send)
        finally:
            self._arriving -= size

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The origin has been checked; gradio would reflect it in a header that lets that page read the answer.
        scope = dict(scope, headers=[(key, value) for key, value in scope["headers"] if key != b"origin"])
        started = False
        ends: float | None = asyncio.get_running_loop().time() + BODY_SECONDS

        async def received() -> Message:
            """The client's next message; a body that takes too long counts as a disconnect."""
            nonlocal ends
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                return {"type": "http.disconnect"}
            if not message.get("more_body"):
                ends = None
            return message

        async def sent(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = dict(message, headers=[*message.get("headers", []), *_ADDED])
            await send(message)

        try:
            await self._app(scope, received, sent)
        except ClientDisconnect:
            pass
        except Exception:
            if self._is_gone(scope) and not started:
                await _answer(send, *_NO_FILE)
                return
            _log.exception("unexpected error on the page")
            if not started:
                await _answer(send, 500, "unexpected error; the terminal that runs the page says more")

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        if not self._knows_host(scope):
            return 403, "this page answers to its own address only; --allow-host lets in another name"
        if not self._own_origin(scope):
            return 403, "this request comes from another page"
        path, method = scope["path"], scope["method"]
        if not (_POST if method == "POST" else _GET).fullmatch(path) or method not in ("GET", "HEAD", "POST"):
            return 404, "no such page"
        if path.startswith(_FILE) and not self._gives(path.removeprefix(_FILE)):
            return _NO_FILE
        if method != "POST":
            return None
        length = _length(scope)
        if length is None:
            return 411, "the size of the body is missing"
        if path.startswith(_UPLOAD):
            if length > LARGEST_FILE + (64 << 10):  # and what is around the file
                return 413, f"larger than {LARGEST_FILE >> 20} MiB, the most that the page takes"
            if self._held() + length > MOST_UPLOADED:
                return 507, "no room for more uploads; the page has to be started again"
        elif length > _LARGEST_BODY:
            return 413, f"larger than {_LARGEST_BODY >> 20} MiB, the most that the page takes"
        return None

    def _knows_host(self, scope: Scope) -> bool:
        if known_host(scope, self._hosts):
            return True
        # A foreign name server can make a name lead here, but not an IP address.
        return self._open and all(_is_address(host) for host in _header(scope, b"host"))

    def _own_origin(self, scope: Scope) -> bool:
        """Whether a request comes from the page itself, or from no page."""
        (mode,) = _header(scope, b"sec-fetch-mode") or ("",)
        sites = _header(scope, b"sec-fetch-site")
        if mode != "navigate" and any(site in ("cross-site", "same-site") for site in sites):
            return False
        hosts = [_without_port(host) for host in _header(scope, b"host")]
        for origin in _header(scope, b"origin"):
            scheme, _, netloc = origin.partition("://")
            if scheme not in ("http", "https"):
                return False  # "null": a file, or a page in a sandbox
            if _without_port(netloc) not in (*hosts, *self._names):
                return False
        return True

    def _gives(self, name: str) -> bool:
        """Whether a URL names a file in the page's folder."""
        return "\0" not in name and Path(os.path.realpath(name)).is_relative_to(self._folder)

    def _is_gone(self, scope: Scope) -> bool:
        """Whether a request names a file that is not there: a refused upload is removed, though the page may still ask for it."""
        path = scope["path"]
        return path.startswith(_FILE) and not Path(path.removeprefix(_FILE)).is_file()

    def _held(self) -> int:
        """Bytes in the page's folder and in uploads under way."""
        held = self._arriving
        for file in self._folder.rglob("*"):
            with contextlib.suppress(OSError):  # removed meanwhile
                held += file.lstat().st_size
        return held


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip().lower() for key, value in scope["headers"] if key == name]


def _length(scope: Scope) -> int | None:
    given = _header(scope, b"content-length")
    return int(given[0]) if len(given) == 1 and re.fullmatch(r"[0-9]{1,15}", given[0]) else None


def _without_port(netloc: str) -> str:
    """A host and its port, without a default port."""
    return re.sub(r":(80|443)$", "", netloc)


def _is_address(host: str) -> bool:
    """Whether a Host header, with or without a port, is an IP address."""
    try:
        ipaddress.ip_address(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
    return True


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *_ADDED]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
