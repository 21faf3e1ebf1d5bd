"""The server's application: all endpoints, error handlers, the OpenAPI document and the guard, put together."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from scale_rae.serve.decoding import Decoders
from scale_rae.serve.engine import Engine
from scale_rae.serve.errors import HANDLED, RESPONSES, answer_to
from scale_rae.serve.guard import Guard
from scale_rae.serve.links import Links
from scale_rae.serve.routes.chat import CHAT, chat_router
from scale_rae.serve.routes.health import health_router
from scale_rae.serve.routes.home import home_router
from scale_rae.serve.routes.images import IMAGES, images_router
from scale_rae.serve.routes.models import MODELS, models_router
from scale_rae.serve.routes.responses import RESPONSES as RESPONSES_PATH
from scale_rae.serve.routes.responses import responses_router
from scale_rae.serve.settings import DOCS, HEALTH, HOME, METRICS, OPENAPI, READY, ServeSettings
from scale_rae.version import __version__

ROUTES = (HOME, HEALTH, READY, METRICS, OPENAPI, DOCS, MODELS)  # besides those that take a body


def make_app(engine: Engine, settings: ServeSettings, decoders: Decoders) -> Guard:
    """The application in front of an engine and decoders, which the caller closes."""
    app = FastAPI(
        title="Scale-RAE",
        version=__version__,
        summary="One model that draws and looks, behind OpenAI's interfaces.",
        openapi_url=OPENAPI,
        docs_url=DOCS if settings.docs else None,  # its page loads scripts from elsewhere
        redoc_url=None,
        responses=RESPONSES,
    )

    links = Links(settings.limits.linked, settings.limits.links)

    async def handle(request: Request, error: Exception) -> JSONResponse:
        status, body, headers = answer_to(error)
        if status == 429:
            headers["Retry-After"] = str(engine.wait_hint())
        return JSONResponse(body, status, headers)

    for kind in HANDLED:
        app.add_exception_handler(kind, handle)
    for router in (
        health_router(engine),
        models_router(settings),
        images_router(engine, settings, links),
        home_router(engine, settings, links),
        chat_router(engine, settings, decoders),
        responses_router(engine, settings, decoders),
    ):
        app.include_router(router)
    _document_limits(app, settings)
    return Guard(app, engine, settings, ROUTES, (IMAGES, CHAT, RESPONSES_PATH))


def _document_limits(app: FastAPI, settings: ServeSettings) -> None:
    """Adds to the OpenAPI document what this server allows, and whether it requires a key."""
    plain, limits = app.openapi, settings.limits
    bounds: dict[str, dict[str, Any]] = {
        "prompt": {"maxLength": limits.prompt},
        "n": {"maximum": limits.drawings},
        "best_of": {"maximum": limits.drawings},
        "steps": {"maximum": limits.steps},
        "model": {"enum": [settings.name]},
    }

    @functools.cache
    def openapi() -> dict[str, Any]:
        value = plain()
        schemas = value["components"]["schemas"]
        for name in ("ImageRequest", "ChatRequest", "ResponsesRequest"):
            for field, bound in bounds.items():
                schema = schemas[name]["properties"].get(field, {})
                for variant in schema.get("anyOf", [schema]):
                    if variant.get("type") != "null" and "const" not in variant:
                        variant.update(bound)
        if settings.api_key is not None:  # the Guard checks it: FastAPI's HTTPBearer would do so after reading the body
            value["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            value["security"] = [{"key": []}]
        return value

    app.openapi = openapi  # type: ignore[method-assign]
