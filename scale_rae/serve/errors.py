"""Turns any exception into an answer: status, a body in OpenAI's shape that names the field, and headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from scale_rae.errors import InputError
from scale_rae.serve import schema
from scale_rae.serve.refusals import Refused, error_body, internal_error

HANDLED = (RequestValidationError, HTTPException, Refused, InputError, Exception)
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorResponse, "description": text}
    for status, text in (
        (400, "The request is not one that can be carried out; `param` names the field."),
        (401, "No API key, or a wrong one."),
        (403, "A host name that is not this server's."),
        (404, "No such model or route."),
        (408, "The body took too long to arrive."),
        (413, "The body is too large."),
        (429, "Too many requests wait already."),
        (500, "A defect of the server."),
        (503, "Still loading, or shutting down."),
        (504, "Not done within the time limit."),
    )
}
_VARIANTS = {"user", "system", "developer", "assistant", "text", "image_url"}  # of messages and of their parts
_FIELDS = {
    name
    for model in vars(schema).values()
    if isinstance(model, type) and issubclass(model, BaseModel)
    for name in model.model_fields
}


def answer_to(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error. The text of an unexpected error is not given away."""
    if isinstance(error, RequestValidationError):
        field, message = _violation(error.errors())
        return 400, error_body(400, "invalid_value", f"{field}: {message}", field), {}
    if isinstance(error, InputError):
        return 400, error_body(400, "invalid_value", str(error)), {}
    if isinstance(error, HTTPException):
        known = {404: "no such route", 405: "the route does not take this method"}.get(error.status_code)
        is_body = error.status_code == 400
        message = known or ("the body is not valid JSON" if is_body else "the request cannot be read")
        body = error_body(error.status_code, None, message, "body" if is_body else None)
        return error.status_code, body, dict(error.headers or {})
    refused = error if isinstance(error, Refused) else internal_error()
    return refused.status, error_body(refused.status, refused.code, str(refused), refused.field), refused.headers()


def _violation(errors: Sequence[Any]) -> tuple[str, str]:
    """(field, what is wrong with it) of the deepest violation, which lies in the variant that was meant."""
    error = max(errors, key=lambda e: len(e["loc"]))
    where = error["loc"]
    path = []
    for i, part in enumerate(where[1:], 1):
        is_variant = isinstance(where[i - 1], int) and where[i - 2] != "images" and part in _VARIANTS
        is_new = i == len(where) - 1 and error["type"] == "extra_forbidden"
        if isinstance(part, int) or is_new or (part in _FIELDS and not is_variant):
            path.append(str(part)[:64])
    if error["type"] == "json_invalid":
        return "body", "not valid JSON"
    limits = error.get("ctx", {})
    if limits.get("max_length") == 0:
        return ".".join(path), "only an empty one is possible here"
    if limits.get("le") == 0:
        return ".".join(path), "only 0 is possible here"
    message = {
        "extra_forbidden": "no such field",
        "missing": "is missing",
        "model_attributes_type": "is not a JSON object"
        + (" that comes with Content-Type: application/json" if len(where) == 1 else ""),
    }.get(error["type"], error["msg"])
    return ".".join(path) or "body", message
