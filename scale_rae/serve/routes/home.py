"""GET /: a page with examples for this server; GET /v1/images/files/{name}: the pictures that answers link to."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from scale_rae.serve.engine import Engine
from scale_rae.serve.links import Links
from scale_rae.serve.refusals import Refused
from scale_rae.serve.settings import HOME, PICTURE_FILES, ServeSettings
from scale_rae.templates import fill_template
from scale_rae.version import __version__

# The page runs and loads nothing.
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "Cache-Control": "no-store"}


def home_router(engine: Engine, settings: ServeSettings, links: Links) -> APIRouter:
    """The endpoints' router."""
    router = APIRouter()

    @router.head(HOME, include_in_schema=False)
    @router.get(HOME, include_in_schema=False, response_class=HTMLResponse)
    async def home(request: Request) -> Any:
        """A page for people who open the server's address."""
        page = fill_template(
            "serve.html",
            address=str(request.base_url).rstrip("/"),
            model=settings.name,
            version=__version__,
            needs_key=settings.api_key is not None,
            ready=engine.ready.is_set() and not engine.draining,
            rewards=list(settings.rewards),
            docs=settings.docs,
        )
        return HTMLResponse(page, headers=HEADERS)

    @router.head(f"{PICTURE_FILES}/{{name}}", include_in_schema=False)
    @router.get(f"{PICTURE_FILES}/{{name}}", response_class=Response)
    async def picture(name: str) -> Response:
        """A picture that an answer linked to. Its name is the key to it."""
        found = links.get(name)
        if found is None:
            raise Refused(404, "picture_expired", "no such picture; pictures are kept for a limited time", "name")
        left = max(0, int(found.expires - time.monotonic()))
        headers = {"Cache-Control": f"private, max-age={left}, immutable", "X-Content-Type-Options": "nosniff"}
        return Response(found.data, media_type=found.media_type, headers=headers)

    return router
