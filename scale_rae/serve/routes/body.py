"""Parses request bodies: JSON in UTF-8, with bounds on numbers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from scale_rae.jsonio import parse_json


def json_router() -> APIRouter:
    """A router whose routes read bodies by `jsonio`, which bounds numbers; FastAPI has no other setting for that."""
    return APIRouter(route_class=_Route)


class _Request(Request):
    async def json(self) -> Any:
        return parse_json(await self.body(), constants=True)  # NaN is refused by the field that it is for


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handler
