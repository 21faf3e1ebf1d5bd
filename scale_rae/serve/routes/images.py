"""POST /v1/images/generations: draws images, and returns the best of them."""

from __future__ import annotations

import base64
import time
from typing import Any

from fastapi import APIRouter, Request

from scale_rae.errors import ConfigError
from scale_rae.noise import new_seed
from scale_rae.prompt import Turn
from scale_rae.serve.engine import Engine
from scale_rae.serve.jobs import Inbox, Job
from scale_rae.serve.links import Links, link_to
from scale_rae.serve.refusals import invalid
from scale_rae.serve.routes.body import json_router
from scale_rae.serve.routes.checks import check_model, check_sampling, check_text, client_name
from scale_rae.serve.schema import AUTO, ImageData, ImageRequest, ImagesResponse, SearchSummary
from scale_rae.serve.settings import OWN_JUDGEMENT, ServeSettings
from scale_rae.serve.streaming import result_of
from scale_rae.wording import as_request

IMAGES = "/v1/images/generations"


def images_router(engine: Engine, settings: ServeSettings, links: Links) -> APIRouter:
    """The endpoint's router."""
    router, limits = json_router(), settings.limits

    @router.post(IMAGES, response_model=ImagesResponse, response_model_exclude_none=True)
    async def images(body: ImageRequest, request: Request) -> Any:
        """Draws."""
        engine.check_open()
        check_model(body.model, settings)
        best_of = body.best_of if isinstance(body.best_of, int) else body.n
        check_sampling(body, engine, limits, best_of, "best_of" if isinstance(body.best_of, int) else "n")
        if best_of < body.n:
            raise invalid("best_of", f"must be at least n, which is {body.n}")
        check_text(body.prompt, len(body.prompt), "prompt", limits)
        size = f"{engine.model.image_size}x{engine.model.image_size}"
        if body.size not in ("auto", size):
            raise invalid("size", f'this model draws "{size}"; give that or "auto"')
        if body.output_format == "png" and body.output_compression not in (None, 100):
            raise invalid("output_compression", "PNG is lossless; give 100, or output_format jpeg or webp")
        options, reward = body.options(limits.steps, engine.model.config.student), _reward(body, engine, best_of)
        searcher = None
        if body.best_of == AUTO:
            searcher = engine.searcher(body.n, limits.drawings, str(reward), options)
        inbox = Inbox(limits.deadline)
        job = Job(
            [Turn("user", as_request(body.prompt, settings.prompt_prefix))],
            None,
            options,
            new_seed() if body.seed is None else body.seed,
            inbox.put,
            inbox.deadline,
            count=body.n,
            best_of=best_of,
            searcher=searcher,
            reward=reward,
            subject=body.prompt,
            must_draw=True,
            form=body.output_format,
            quality=100 if body.output_compression is None else body.output_compression,
            client=client_name(request),
        )
        result = await result_of(job, engine, inbox, request)
        data = []
        for image in result.images:
            if body.response_format == "url":
                where: dict[str, Any] = {"url": link_to(links.add(image.file, body.output_format), request.base_url)}
            else:
                where = {"b64_json": base64.b64encode(image.file).decode("ascii")}
            data.append(ImageData(**where, seed=image.seed, **image.scores))
        search = None if result.search is None else SearchSummary(**result.search)
        form = body.output_format
        return ImagesResponse(created=int(time.time()), data=data, size=size, output_format=form, search=search)

    return router


def _reward(body: ImageRequest, engine: Engine, best_of: int) -> str | None:
    """What scores the images, or None where all that are drawn are returned."""
    available = [*engine.rewards, OWN_JUDGEMENT]
    if body.reward is not None and body.reward not in available:
        raise invalid("reward", f"not loaded on this server, which has {', '.join(available)}")
    if body.reward is not None and body.best_of is None:
        raise invalid("reward", "picks the best of best_of images; give best_of too")
    if body.best_of != AUTO and best_of == body.n:
        return None
    reward = body.reward or available[0]
    if body.best_of == AUTO or reward == OWN_JUDGEMENT:
        try:
            engine.model.check_reads()
        except ConfigError:  # which names a file
            field = "best_of" if body.best_of == AUTO else "reward"
            raise invalid(field, "this model cannot look at what it draws; give a number and a reward model") from None
    return reward
