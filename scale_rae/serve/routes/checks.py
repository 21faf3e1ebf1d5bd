"""Checks that several routes share: a request's values against the model and the server's limits."""

from __future__ import annotations

from fastapi import Request

from scale_rae.errors import DeviceError, InputError
from scale_rae.noise import check_noise
from scale_rae.serve.engine import Engine
from scale_rae.serve.guard import client_of
from scale_rae.serve.refusals import Refused, invalid
from scale_rae.serve.schema import ChatRequest, ImageRequest, ResponsesRequest
from scale_rae.serve.settings import Limits, ServeSettings


def client_name(request: Request) -> str:
    """Whom a request counts for when clients take turns."""
    return client_of(request.client.host if request.client else None)


def check_model(name: str | None, settings: ServeSettings) -> None:
    """Raises Refused (404) unless the name is this server's model or absent."""
    if name is not None and name != settings.name:
        raise Refused(404, "model_not_found", f"no such model; this server has {settings.name!r}", "model")


def check_text(text: str, length: int, field: str, limits: Limits) -> None:
    """Raises Refused for text that is empty or not Unicode, or when the request has more than its limit of `length`."""
    if length > limits.prompt:
        raise invalid(field, f"{length} characters of text; at most {limits.prompt}")
    if not text.strip():
        raise invalid(field, "is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(field, "is not valid Unicode text") from None


def check_sampling(
    body: ImageRequest | ChatRequest | ResponsesRequest, engine: Engine, limits: Limits, images: int, field: str
) -> None:
    """Raises Refused for sampling options that this model or server does not take.

    `images` are to be drawn; `field` is the request's field that says so.
    """
    if images > limits.drawings:
        raise invalid(field, f"{images} images to draw; at most {limits.drawings} in a request")
    if body.steps is not None and body.steps > limits.steps:
        raise invalid("steps", f"{body.steps}; at most {limits.steps} on this server")
    if body.guidance != 1.0 and not engine.model.config.dit.null_condition:
        raise invalid("guidance", "this model was trained without condition dropout; only 1 works")
    interval = body.guidance_interval
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise invalid("guidance_interval", "needs 0 <= lo < hi <= 1")
    try:
        check_noise(body.noise)
    except DeviceError as e:
        raise invalid("noise", str(e)) from None
    student = engine.model.config.student
    for field, why in () if student is None else body.refused_by(student):
        raise invalid(field, why)
    try:
        body.options(limits.steps, student)
    except InputError as e:
        raise invalid("steps", str(e)) from None  # the other options have been checked
