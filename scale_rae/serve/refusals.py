"""The error `Refused` and its common cases, in OpenAI's shape. Imports no torch or fastapi."""

from __future__ import annotations

from typing import Any

from scale_rae.errors import ScaleRAEError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(ScaleRAEError):
    """A request that was not accepted or not completed: `status` is HTTP's, `code` names the reason in a word."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def headers(self) -> dict[str, str]:
        """The headers of its response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status == 503:
            return {"Retry-After": "5"}
        if self.status == 504:
            return {"x-should-retry": "false"}  # OpenAI's clients would repeat the request
        if self.status in (408, 413) or self.code in ("uploads_full", "bad_framing"):
            return {"Connection": "close"}  # the rest of the body is not read
        return {}


def error_body(status: int, code: str | None, message: str, field: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def invalid(field: str, message: str) -> Refused:
    """A 400 that names a field."""
    return Refused(400, "invalid_value", f"{field}: {message}", field)


def client_left() -> Refused:
    """The refusal of a request whose client has closed its connection; it appears only in the log."""
    return Refused(499, "client_left", "the client has gone")


def shutting_down() -> Refused:
    """The refusal of a request that a server which shuts down does not start."""
    return Refused(503, "shutting_down", "the server is shutting down")


def internal_error() -> Refused:
    """What a client learns of an unexpected error."""
    return Refused(500, "internal_error", "an internal error; the server's log has more")
