"""Routes: from requests to jobs and from results to answers, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from torch import Tensor

from scale_rae.errors import InputError
from scale_rae.jsonio import parse_json
from scale_rae.prompt import SYSTEM, Turn
from scale_rae.serve import schema
from scale_rae.serve.decoding import Decoders
from scale_rae.serve.engine import Engine, Job, Result, new_seed
from scale_rae.serve.errors import Refused, client_left, error_body, invalid
from scale_rae.serve.guard import LEFT, Guard, client_of
from scale_rae.serve.settings import OWN_JUDGEMENT, Limits, ServeSettings
from scale_rae.version import __version__
from scale_rae.wording import as_request

IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"
ROUTES = ("/health", "/ready", "/metrics", "/openapi.json", "/v1/models")
_PING = 15.0  # seconds of silence after which a stream says that it is alive
_log = logging.getLogger("scale_rae.serve")

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


def make_app(engine: Engine, settings: ServeSettings, decoders: Decoders) -> Guard:
    """The application: what `schema` describes, in front of an engine and decoders that somebody else closes."""
    limits, created = settings.limits, int(time.time())
    app = FastAPI(
        title="Scale-RAE",
        version=__version__,
        summary="One model that draws and looks, behind OpenAI's interfaces.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    app.router.route_class = _Route
    app.state.wait_hint = engine.wait_hint
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

    @app.post(IMAGES, response_model=schema.ImagesResponse, response_model_exclude_none=True)
    async def images(body: schema.ImageRequest, request: Request) -> Any:
        """Draws."""
        engine.check_open()
        _check_model(body.model, settings)
        best_of = body.best_of or body.n
        _check_sampling(body, engine, limits, best_of, "best_of" if body.best_of else "n")
        if best_of < body.n:
            raise invalid("best_of", f"must be at least n, which is {body.n}")
        _check_text(body.prompt, len(body.prompt), "prompt", limits)
        side = engine.model.image_size
        size = f"{side}x{side}"
        if body.size not in ("auto", size):
            raise invalid("size", f'this model draws "{size}"; give that or "auto"')
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
            client=_client(request),
        )
        result = await _result(engine, job, inbox, request)
        data = [schema.ImageData(b64_json=_base64(d.png), seed=d.seed, **d.scores) for d in result.drawings]
        return schema.ImagesResponse(created=int(time.time()), data=data, size=size)

    @app.post(
        CHAT,
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
        async with _attended(request, inbox.deadline):
            pixels = await _pixels(engine, urls, decoders, _client(request))
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
            client=_client(request),
        )
        name = f"chatcmpl-{secrets.token_hex(12)}"
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return _EventStream(functools.partial(_stream, engine, job, inbox, request, name, settings.name, usage))
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

    return Guard(app, engine, settings, ROUTES, (IMAGES, CHAT))


class _Request(Request):
    """A request whose JSON is UTF-8, with no number longer than any that means something."""

    async def json(self) -> Any:
        return parse_json(await self.body(), constants=True)  # NaN is refused by the field it is for


class _Route(APIRoute):
    """A route whose handler gets a `_Request`: FastAPI's way to read bodies otherwise."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handler


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
            Exception: what went wrong with the job.
        """
        try:
            async with asyncio.timeout(patience):
                event = await self._queue.get()
        except TimeoutError:
            return None
        if isinstance(event, BaseException):
            raise event
        return event


async def _result(engine: Engine, job: Job, inbox: _Inbox, request: Request) -> Result:
    """Has a job done and waits for its result, or for its client to go."""
    async with _attended(request, inbox.deadline):
        engine.submit(job)
        try:
            while not isinstance(event := await inbox.get(), Result):
                pass
            return event
        finally:
            engine.cancel(job)


@contextlib.asynccontextmanager
async def _attended(request: Request, deadline: float) -> AsyncIterator[None]:
    """A block that ends with Refused when its client has gone (499), or at `deadline` on time.monotonic's clock (504)."""
    gone = asyncio.create_task(_gone(request))
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())) as limit:

            def end(gone: asyncio.Task[None]) -> None:
                if not gone.cancelled():
                    limit.reschedule(asyncio.get_running_loop().time())

            gone.add_done_callback(end)
            try:
                yield
            finally:
                gone.remove_done_callback(end)
    except TimeoutError:
        if gone.done():
            raise client_left() from None
        raise Refused(504, "deadline_exceeded", "the request was not done within the server's time limit") from None
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    """Ends when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events that one coroutine writes, so that whatever ends it ends all that it has begun."""

    def __init__(self, write: Callable[[Callable[[str], Awaitable[None]]], Awaitable[None]]) -> None:
        super().__init__(iter(()), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def put(text: str) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        await self._write(put)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _stream(
    engine: Engine,
    job: Job,
    inbox: _Inbox,
    request: Request,
    name: str,
    model: str,
    usage: bool,
    put: Callable[[str], Awaitable[None]],
) -> None:
    """Puts server-sent events: text as it is written, then images, then [DONE].

    Raises:
        Refused: when the job is not taken; nothing has been put then.
    """
    created = int(time.time())

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        value = {"id": name, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices}
        return f"data: {json.dumps(value | more)}\n\n"

    def delta(values: dict[str, Any], index: int | None = None, reason: str | None = None) -> str:
        indices = range(job.count) if index is None else (index,)
        return chunk([{"index": i, "delta": values, "finish_reason": reason, "logprobs": None} for i in indices])

    engine.submit(job)
    try:
        async with _attended(request, inbox.deadline):
            await put(delta({"role": "assistant", "content": ""}))
            while not isinstance(event := await inbox.get(_PING), Result):
                await put(": working\n\n" if event is None else delta({"content": event}))
            if event.drawings:
                for i in range(job.count):
                    parts = [part.model_dump(exclude_none=True) for part in _image_parts(event, i)]
                    await put(delta({"images": parts}, i))
            await put(delta({}, reason="length" if event.cut_off else "stop"))
            if usage:
                await put(chunk([], usage=_usage(event).model_dump()))
            await put("data: [DONE]\n\n")
    except Exception as e:
        status, body, _ = _error_of(e)
        if status == 499:
            request.scope[LEFT] = True
        else:
            if status == 500:
                engine.report(e)
            await put(f"data: {json.dumps(body)}\n\n")
    finally:
        engine.cancel(job)


def _client(request: Request) -> str:
    return client_of(request.client.host if request.client else None)


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


def _check_model(name: str | None, settings: ServeSettings) -> None:
    if name is not None and name != settings.name:
        raise Refused(404, "model_not_found", f"no such model; this server has {settings.name!r}", "model")


def _check_text(text: str, length: int, field: str, limits: Limits) -> None:
    if length > limits.prompt:
        raise invalid(field, f"{length} characters of text; at most {limits.prompt}")
    if not text.strip():
        raise invalid(field, "is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(field, "is not valid Unicode text") from None


def _check_sampling(
    body: schema.ImageRequest | schema.ChatRequest, engine: Engine, limits: Limits, drawings: int, field: str
) -> None:
    if drawings > limits.drawings:
        raise invalid(field, f"{drawings} images to draw; at most {limits.drawings} in a request")
    if body.steps is not None and body.steps > limits.steps:
        raise invalid("steps", f"{body.steps}; at most {limits.steps} on this server")
    if body.guidance != 1.0 and not engine.model.config.dit.null_condition:
        raise invalid("guidance", "this model was trained without condition dropout; only 1 works")
    interval = body.guidance_interval
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise invalid("guidance_interval", "needs 0 <= lo < hi <= 1")
    try:
        body.options(limits.steps)
    except InputError as e:
        raise invalid("steps", str(e)) from None  # all else has been looked at


def _judge(body: schema.ImageRequest, engine: Engine, best_of: int) -> str | None:
    """What picks the best, or None when there is nothing to pick."""
    there = [*engine.rewards, OWN_JUDGEMENT]
    if body.reward is not None and body.reward not in there:
        raise invalid("reward", f"not loaded on this server, which has {', '.join(there)}")
    if body.reward is not None and body.best_of is None:
        raise invalid("reward", "picks the best of best_of images; give best_of too")
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
            _check_text(text or "-" if shown else text, length, field, limits)
            turns.append(Turn("user", text, len(shown)))
        else:
            _check_text(text or "-", length, field, limits)
            if message.role == "assistant":
                turns.append(Turn("assistant", text, len(shown)))
            else:
                system.append(text)
        urls += shown
        if len(urls) > limits.images:
            raise invalid(shown[-1][0], f"more than {limits.images} images in a request")
    if not turns or turns[-1].role != "user":
        raise invalid("messages", "the last one must be a user's")
    return turns, "\n".join(system) or SYSTEM, urls


async def _pixels(engine: Engine, urls: Sequence[tuple[str, str]], decoders: Decoders, client: str) -> Tensor | None:
    """The images, preprocessed: large ones are small before they wait."""
    if not urls:
        return None
    import torch

    def preprocess(image: Image.Image) -> Tensor:
        return engine.model.encoder.preprocess([image])

    return torch.cat([await decoders.read(url, field, client, preprocess) for field, url in urls])


# Errors ----------------------------------------------------------------------------------------------------------------------


def _error_of(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error; what an unexpected one says stays here."""
    if isinstance(error, RequestValidationError):
        field, message = _violation(error.errors())
        return 400, error_body(400, "invalid_value", f"{field}: {message}", field), {}
    if isinstance(error, Refused):
        return error.status, error_body(error.status, error.code, str(error), error.field), error.headers()
    if isinstance(error, InputError):
        return 400, error_body(400, "invalid_value", str(error)), {}
    if isinstance(error, HTTPException):
        said = {404: "no such route", 405: "the route does not take this method"}.get(error.status_code)
        message = said or ("the body is not valid JSON" if error.status_code == 400 else "the request cannot be read")
        where = "body" if error.status_code == 400 else None
        return error.status_code, error_body(error.status_code, None, message, where), dict(error.headers or {})
    return 500, error_body(500, "internal_error", "an internal error; the server's log has more"), {}


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
