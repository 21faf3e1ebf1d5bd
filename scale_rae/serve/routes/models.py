"""GET /v1/models: the one model that the server has."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from scale_rae.serve.routes.checks import check_model
from scale_rae.serve.schema import ModelCard, ModelList
from scale_rae.serve.settings import ServeSettings

MODELS = "/v1/models"


def models_router(settings: ServeSettings) -> APIRouter:
    """The endpoints' router."""
    router = APIRouter()
    card = ModelCard(id=settings.name, created=int(time.time()))

    @router.get(MODELS, response_model=ModelList)
    async def models() -> Any:
        """The one model there is."""
        return ModelList(data=[card])

    @router.get(f"{MODELS}/{{model:path}}", response_model=ModelCard)
    async def model(model: str) -> Any:
        """The model, by its name."""
        check_model(model, settings)
        return card

    return router
