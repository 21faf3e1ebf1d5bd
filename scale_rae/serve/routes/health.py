"""GET /health, /ready and /metrics, for monitoring."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from scale_rae.serve.engine import Engine
from scale_rae.serve.schema import Status
from scale_rae.serve.settings import HEALTH, METRICS, READY


def health_router(engine: Engine) -> APIRouter:
    """The endpoints' router."""
    router = APIRouter()

    @router.head(HEALTH, include_in_schema=False)
    @router.get(HEALTH, response_model=Status)
    async def health() -> Any:
        """Whether the process is alive."""
        return {"status": "ok"}

    @router.head(READY, include_in_schema=False)
    @router.get(READY, response_model=Status)
    async def ready() -> Any:
        """Whether requests are taken."""
        if engine.draining or not engine.ready.is_set():
            engine.check_open()
        return {"status": "ready"}

    @router.get(METRICS, response_class=Response)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
