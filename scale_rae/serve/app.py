"""HTTP: routes, who may ask and how much, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from scale_rae import __version__
from scale_rae.errors import InputError
from scale_rae.images import to_rgb
from scale_rae.prompt import SYSTEM, Turn
from scale_rae.scaling.experiment import as_request
from scale_rae.serve import schema
from scale_rae.serve.engine import Engine, Job, Refused, Result, new_seed
from scale_rae.serve.guard import known_host
from scale_rae.serve.pictures import read_data_url
from scale_rae.serve.settings import LOOPBACK, OWN_JUDGEMENT, Limits, ServeSettings

OPEN_PATHS = ("/health", "/ready")  # without a key
_LEFT = "scale_rae.left"  # in a request's scope: whether its client left in the middle of a stream
_PING = 15.0  # seconds of silence after which a stream says that it is alive
_log = logging.getLogger("scale_rae.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ERRORS: dict[int | str, dict[str, Any]] = {
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


def make_app(engine: Engine, settings: ServeSettings) -> ASGIApp:
    """The application: what `schema` describes, in front of an engine that somebody else starts and closes."""
    limits, created = settings.limits, int(time.time())
    gate = asyncio.Semaphore(2)  # images decoded at a time: each may take 100 MB for a moment
    app = FastAPI(
        title="Scale-RAE",
        version=__version__,
        summary="One model that draws and looks, behind OpenAI's interfaces.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    for kind in (RequestValidationError, HTTPException, Refused, InputError, Exception):
        app.add_exception_handler(kind, _handle)
    _describe_limits(app, settings)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=schema.Status)
    async def health() -> Any:
        """Whether the process is alive."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", response_model=schema.Status)
    async def ready() -> Any:
        """Whether requests are taken."""
        if engine.draining or not engine.ready.is_set():
            engine.check_open()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    card = schema.ModelCard(id=settings.name, created=created)

    @app.get("/v1/models", response_model=schema.ModelList)
    async def models() -> Any:
        """The one model there is."""
        return schema.ModelList(data=[card])

    @app.get("/v1/models/{model:path}", response_model=schema.ModelCard)
    async def model(model: str) -> Any:
        """The model, by its name."""
        _check_model(model, settings)
        return card

    @app.post("/v1/images/generations", response_model=schema.ImagesResponse, response_model_exclude_none=True)
    async def images(body: schema.ImageRequest, request: Request) -> Any:
        """Draws."""
        engine.check_open()
        _check_model(body.model, settings)
        best_of = body.best_of or body.n
        _check_sampling(body, engine, limits, best_of, "best_of" if body.best_of else "n")
        if best_of < body.n:
            raise _invalid("best_of", f"must be at least n, which is {body.n}")
        _check_text(body.prompt, len(body.prompt), "prompt", limits)
        side = engine.model.image_size
        size = f"{side}x{side}"
        if body.size not in ("auto", size):
            raise _invalid("size", f'this model draws "{size}"; give that or "auto"')
        inbox = _Inbox(limits.deadline)
        job = Job(
            [Turn("user", as_request(body.prompt, settings.prompt_prefix))],
            None,
            body.options(limits.steps),
            new_seed() if body.seed is None else body.seed,
            inbox.put,
            inbox.deadline,
            count=body.n,
            best_of=best_of,
            judge=_judge(body, engine, best_of),
            subject=body.prompt,
            must_draw=True,
        )
        result = await _result(engine, job, inbox, request)
        data = [schema.ImageData(b64_json=_base64(d.png), seed=d.seed, **d.scores) for d in result.drawings]
        return schema.ImagesResponse(created=int(time.time()), data=data, size=size)

    @app.post(
        "/v1/chat/completions",
        response_model=schema.ChatResponse,
        response_model_exclude_none=True,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def chat(body: schema.ChatRequest, request: Request) -> Any:
        """Answers, and draws when the answer asks for it."""
        engine.check_open()
        _check_model(body.model, settings)
        _check_sampling(body, engine, limits, body.n, "n")
        inbox = _Inbox(limits.deadline)
        turns, system, urls = _conversation(body.messages, limits)
        pixels = await _pixels(engine, urls, limits, gate)
        most = min(body.max_completion_tokens or body.max_tokens or limits.new_tokens, limits.new_tokens)
        job = Job(
            turns,
            pixels,
            body.options(limits.steps),
            new_seed() if body.seed is None else body.seed,
            inbox.put,
            inbox.deadline,
            count=body.n,
            best_of=body.n,
            system=system,
            max_new_tokens=most,
            draws=body.modalities is None or "image" in body.modalities,
            asked_in="messages",
            streams=bool(body.stream),
        )
        name = f"chatcmpl-{secrets.token_hex(12)}"
        if body.stream:
            engine.submit(job)
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = _stream(engine, job, inbox, request, name, settings.name, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        result = await _result(engine, job, inbox, request)
        choices = [
            schema.Choice(
                index=i,
                message=schema.AnswerMessage(
                    content=result.text, images=_image_parts(result, i) if result.drawings else None
                ),
                finish_reason="length" if result.cut_off else "stop",
            )
            for i in range(body.n)
        ]
        return schema.ChatResponse(
            id=name, created=int(time.time()), model=settings.name, choices=choices, usage=_usage(result)
        )

    return _Guard(app, engine, settings)


# Carrying out ----------------------------------------------------------------------------------------------------------------


class _Inbox:
    """What a job emits, on its way from the engine's threads to the request."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[str | Result | BaseException] = asyncio.Queue()

    def put(self, event: str | Result | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self, patience: float | None = None) -> str | Result | None:
        """The next event, or None after `patience`.

        Raises:
            Refused: when the deadline has passed. What went wrong with the job.
        """
        left = self.deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left if patience is None else min(left, patience))):
                event = await self._queue.get()
        except TimeoutError:
            if time.monotonic() < self.deadline:
                return None
            raise Refused(504, "deadline_exceeded", "the request was not done within the server's time limit") from None
        if isinstance(event, BaseException):
            raise event
        return event


async def _result(engine: Engine, job: Job, inbox: _Inbox, request: Request) -> Result:
    """Has a job done and waits for its result, or for its client to go."""
    engine.submit(job)
    gone = asyncio.create_task(_gone(request))
    try:
        while True:
            waiting = asyncio.create_task(inbox.get())
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                raise Refused(499, "client_left", "the client has gone")
            event = waiting.result()
            if isinstance(event, Result):
                return event
    finally:
        gone.cancel()
        engine.cancel(job)


async def _gone(request: Request) -> None:
    """Ends when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    engine: Engine, job: Job, inbox: _Inbox, request: Request, name: str, model: str, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: text as it is written, then images, then [DONE]."""
    created = int(time.time())

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        value = {"id": name, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices}
        return f"data: {json.dumps(value | more)}\n\n"

    def delta(values: dict[str, Any], index: int | None = None, reason: str | None = None) -> str:
        indices = range(job.count) if index is None else (index,)
        return chunk([{"index": i, "delta": values, "finish_reason": reason, "logprobs": None} for i in indices])

    gone = asyncio.create_task(_gone(request))
    request.scope[_LEFT] = True  # unless it comes to its end
    try:
        yield delta({"role": "assistant", "content": ""})
        while True:
            waiting = asyncio.create_task(inbox.get(_PING))
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                return
            event = waiting.result()
            if event is None:
                yield ": working\n\n"
            elif isinstance(event, str):
                yield delta({"content": event})
            else:
                break
        if event.drawings:
            for i in range(job.count):
                parts = [part.model_dump(exclude_none=True) for part in _image_parts(event, i)]
                yield delta({"images": parts}, i)
        yield delta({}, reason="length" if event.cut_off else "stop")
        if usage:
            yield chunk([], usage=_usage(event).model_dump())
        request.scope[_LEFT] = False
        yield "data: [DONE]\n\n"
    except Exception as e:
        request.scope[_LEFT] = False
        _, body, _ = _error_of(e)
        yield f"data: {json.dumps(body)}\n\n"
    finally:
        gone.cancel()
        engine.cancel(job)


def _image_parts(result: Result, index: int) -> list[schema.ImagePart]:
    url = "data:image/png;base64," + _base64(result.drawings[index].png)
    return [schema.ImagePart(type="image_url", image_url=schema.ImageURL(url=url))]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _usage(result: Result) -> schema.Usage:
    return schema.Usage(
        prompt_tokens=result.prompt_tokens,
        completion_tokens=result.new_tokens,
        total_tokens=result.prompt_tokens + result.new_tokens,
    )


# Reading requests ------------------------------------------------------------------------------------------------------------


def _invalid(field: str, message: str) -> Refused:
    return Refused(400, "invalid_value", f"{field}: {message}", field)


def _check_model(name: str | None, settings: ServeSettings) -> None:
    if name is not None and name != settings.name:
        raise Refused(404, "model_not_found", f"no such model; this server has {settings.name!r}", "model")


def _check_text(text: str, length: int, field: str, limits: Limits) -> None:
    if length > limits.prompt:
        raise _invalid(field, f"{length} characters of text; at most {limits.prompt}")
    if not text.strip():
        raise _invalid(field, "is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _invalid(field, "is not valid Unicode text") from None


def _check_sampling(
    body: schema.ImageRequest | schema.ChatRequest, engine: Engine, limits: Limits, drawings: int, field: str
) -> None:
    if drawings > limits.drawings:
        raise _invalid(field, f"{drawings} images to draw; at most {limits.drawings} in a request")
    if body.steps is not None and body.steps > limits.steps:
        raise _invalid("steps", f"{body.steps}; at most {limits.steps} on this server")
    if body.guidance != 1.0 and not engine.model.config.dit.null_condition:
        raise _invalid("guidance", "this model was trained without condition dropout; only 1 works")
    interval = body.guidance_interval
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise _invalid("guidance_interval", "needs 0 <= lo < hi <= 1")
    try:
        body.options(limits.steps)
    except InputError as e:
        raise _invalid("steps", str(e)) from None  # all else has been looked at


def _judge(body: schema.ImageRequest, engine: Engine, best_of: int) -> str | None:
    """What picks the best, or None when there is nothing to pick."""
    there = [*engine.rewards, OWN_JUDGEMENT]
    if body.reward is not None and body.reward not in there:
        raise _invalid("reward", f"not loaded on this server, which has {', '.join(there)}")
    if body.reward is not None and body.best_of is None:
        raise _invalid("reward", "picks the best of best_of images; give best_of too")
    return (body.reward or there[0]) if body.best_of is not None and best_of > body.n else None


def _conversation(messages: Sequence[Any], limits: Limits) -> tuple[list[Turn], str, list[tuple[str, str]]]:
    """Turns, the system's text, and the images' (field, data URL) in their order."""
    turns: list[Turn] = []
    urls: list[tuple[str, str]] = []
    system: list[str] = []
    length = 0
    for i, message in enumerate(messages):
        field = f"messages.{i}.content"
        content = [] if message.content is None else message.content
        parts = [schema.TextPart(type="text", text=content)] if isinstance(content, str) else content
        texts = [part.text for part in parts if isinstance(part, schema.TextPart)]
        shown = [
            (f"{field}.{j}.image_url.url", part.image_url.url)
            for j, part in enumerate(parts)
            if isinstance(part, schema.ImagePart)
        ]
        if message.role == "assistant":
            shown = [(f"messages.{i}.images.{j}.image_url.url", p.image_url.url) for j, p in enumerate(message.images)]
        text = "\n".join(texts)
        length += len(text)
        if message.role == "user":
            _check_text(text, length, field, limits)
            turns.append(Turn("user", text, len(shown)))
        else:
            _check_text(text or "-", length, field, limits)
            if message.role == "assistant":
                turns.append(Turn("assistant", text, len(shown)))
            else:
                system.append(text)
        urls += shown
        if len(urls) > limits.images:
            raise _invalid(shown[-1][0], f"more than {limits.images} images in a request")
    if not turns or turns[-1].role != "user":
        raise _invalid("messages", "the last one must be a user's")
    return turns, "\n".join(system) or SYSTEM, urls


async def _pixels(
    engine: Engine, urls: Sequence[tuple[str, str]], limits: Limits, gate: asyncio.Semaphore
) -> Tensor | None:
    """The images, preprocessed: large ones are small before they wait."""
    if not urls:
        return None
    import torch

    def read(field: str, url: str) -> Tensor:
        try:
            image = read_data_url(url, field, limits.pixels)
        except InputError as e:
            raise Refused(400, "invalid_image", str(e), field) from None
        return engine.model.encoder.preprocess([to_rgb(image)])

    parts = []
    for field, url in urls:
        async with gate:
            parts.append(await asyncio.to_thread(read, field, url))
    return torch.cat(parts)


# Errors ----------------------------------------------------------------------------------------------------------------------


def _error_body(status: int, code: str | None, message: str, field: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def _error_of(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error; what an unexpected one says stays here."""
    headers: dict[str, str] = {}
    if isinstance(error, RequestValidationError):
        field, message = _violation(error.errors())
        return 400, _error_body(400, "invalid_value", f"{field}: {message}", field), headers
    if isinstance(error, Refused):
        if error.status == 504:
            headers["x-should-retry"] = "false"  # OpenAI's clients would ask for it all again
        if error.status == 503:
            headers["Retry-After"] = "5"
        return error.status, _error_body(error.status, error.code, str(error), error.field), headers
    if isinstance(error, InputError):
        return 400, _error_body(400, "invalid_value", str(error)), headers
    if isinstance(error, HTTPException):
        said = {404: "no such route", 405: "the route does not take this method"}.get(error.status_code)
        message = said or ("the body is not valid JSON" if error.status_code == 400 else "the request cannot be read")
        where = "body" if error.status_code == 400 else None
        return error.status_code, _error_body(error.status_code, None, message, where), dict(error.headers or {})
    return 500, _error_body(500, "internal_error", "an internal error; the server's log has more"), headers


async def _handle(request: Request, error: Exception) -> JSONResponse:
    status, body, headers = _error_of(error)
    if status == 429:
        headers["Retry-After"] = str(request.app.state.wait_hint())
    return JSONResponse(body, status, headers)


_FIELDS = {
    name
    for model in vars(schema).values()
    if isinstance(model, type) and issubclass(model, BaseModel)
    for name in model.model_fields
}


_VARIANTS = {"user", "system", "developer", "assistant", "text", "image_url"}  # of messages, and of parts of one


def _violation(errors: Sequence[Any]) -> tuple[str, str]:
    """(field, what is wrong with it) of the violation that lies deepest, which is in the variant that was meant."""
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
    said = {
        "extra_forbidden": "no such field",
        "missing": "is missing",
        "model_attributes_type": "is not a JSON object"
        + (" that comes with Content-Type: application/json" if len(where) == 1 else ""),
    }.get(error["type"], error["msg"])
    return ".".join(path) or "body", said


# Who may ask, and how much ---------------------------------------------------------------------------------------------------


class _Guard:
    """Around the application: key, host, size and time of bodies, metrics, and a line in the log for each request."""

    def __init__(self, app: FastAPI, engine: Engine, settings: ServeSettings) -> None:
        self._app, self._engine, self._settings = app, engine, settings
        self._held = 0  # bytes of bodies
        app.state.wait_hint = engine.wait_hint
        self.openapi = app.openapi
        self._routes = {"/health", "/ready", "/metrics", "/openapi.json", "/v1/models"} | {
            "/v1/images/generations",
            "/v1/chat/completions",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, body = time.monotonic(), 0, b""
        name = f"req_{secrets.token_hex(8)}"

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name.encode())]}
            await send(message)

        try:
            try:
                self._check(scope)
                if scope["method"] in ("POST", "PUT", "PATCH"):
                    body = await self._body(scope, receive)
                await self._app(scope, _replay(body, receive), answer)
            except Refused as e:
                code, value, headers = _error_of(e)
                if code == 429:
                    headers["Retry-After"] = str(self._engine.wait_hint())
                if code in (408, 413) or e.code == "uploads_full":
                    headers["Connection"] = "close"  # the rest of the body is not read
                if code == 401:
                    headers["WWW-Authenticate"] = "Bearer"
                await JSONResponse(value, code, headers)(scope, receive, answer)
        except Exception as e:
            self._engine.report(e)
            if not status:
                code, value, headers = _error_of(e)
                await JSONResponse(value, code, headers)(scope, receive, answer)
        finally:
            self._held -= len(body)
            route = self._route(scope["path"])
            seconds = time.monotonic() - start
            status = 499 if not status or scope.get(_LEFT) else status
            self._engine.metrics.requests.labels(route, str(status)).inc()
            self._engine.metrics.latency.labels(route).observe(seconds)
            if route not in ("/health", "/ready", "/metrics"):
                _log.info("%s %s %s %d %.0f ms", name, scope["method"], route, status, 1000 * seconds)

    def _route(self, path: str) -> str:
        """The path if it is one of ours: nobody else's words get into logs and metrics."""
        if path in self._routes:
            return path
        return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"

    def _check(self, scope: Scope) -> None:
        headers = {key: value for key, value in scope["headers"] if key == b"authorization"}
        key = self._settings.api_key
        if key is not None:
            if scope["path"] in OPEN_PATHS:
                return
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given.strip(), key.encode()) or scheme.lower() != b"bearer":
                raise Refused(401, "invalid_api_key", "no API key, or a wrong one; send Authorization: Bearer …")
        elif self._settings.host in LOOPBACK and not known_host(scope):
            raise Refused(
                403, "wrong_host", "this server answers to localhost only; behind a proxy, give it an API key"
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The body, as far as it may be read; its bytes stay in `_held`."""
        if scope["path"].startswith("/v1/"):
            self._engine.check_open()  # before it is read
        most = self._settings.limits.body
        declared = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
        too_large = Refused(413, "body_too_large", f"the body is larger than {most} bytes")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        parts, size, whole = [], 0, False
        try:
            async with asyncio.timeout(self._settings.limits.upload):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(499, "client_left", "the client has gone")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self._held += len(parts[-1])
                    if size > most:
                        raise too_large
                    if self._held > self._settings.limits.bodies:
                        raise Refused(429, "uploads_full", "too much is being uploaded at once; try again later")
                    if not message.get("more_body"):
                        whole = True
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, "slow_body", "the body took too long to arrive") from None
        finally:
            if not whole:
                self._held -= size


def _replay(body: bytes, receive: Receive) -> Callable[[], Any]:
    """A `receive` that gives the body, and then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def _describe_limits(app: FastAPI, settings: ServeSettings) -> None:
    """Says in the OpenAPI document what this server allows, and whether it wants a key."""
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
        for name in ("ImageRequest", "ChatRequest"):
            for field, bound in bounds.items():
                described = schemas[name]["properties"].get(field, {})
                for variant in described.get("anyOf", [described]):
                    if variant.get("type") != "null":
                        variant.update(bound)
        if settings.api_key is not None:
            value["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            value["security"] = [{"key": []}]
        return value

    app.openapi = openapi  # type: ignore[method-assign]
