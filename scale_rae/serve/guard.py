"""Who may ask: the hosts that a server answers to. Nothing here needs torch, so the demo page uses it too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scale_rae.serve.settings import LOOPBACK

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+|[0-9a-f:]+)(:\d{1,5})?")


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


class KnownHosts:
    """ASGI middleware that answers 403 unless a request's host is one of `hosts`: `app.add_middleware(KnownHosts)`.

    Starlette's TrustedHostMiddleware does not know IPv6 addresses in all versions.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] = LOOPBACK) -> None:
        self._app, self._hosts = app, tuple(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or known_host(scope, self._hosts):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            said = f"this server answers only to {', '.join(self._hosts)}\n"
            await send({"type": "http.response.body", "body": said.encode()})
