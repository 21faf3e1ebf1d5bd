"""POST /v1/chat/completions: answers, also about images, and draws if the answer starts an image."""

from __future__ import annotations

import base64
import functools
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request

from scale_rae.serve.decoding import Decoders
from scale_rae.serve.engine import Engine
from scale_rae.serve.jobs import Inbox, Job, Result
from scale_rae.serve.routes.body import json_router
from scale_rae.serve.routes.checks import check_model, check_sampling
from scale_rae.serve.routes.conversations import Said, asked_of, job_of
from scale_rae.serve.schema import (
    AnswerMessage,
    ChatRequest,
    ChatResponse,
    Choice,
    ImagePart,
    ImageURL,
    Message,
    TextPart,
    Usage,
)
from scale_rae.serve.settings import ServeSettings
from scale_rae.serve.streaming import PING, EventStream, put_events, result_of

CHAT = "/v1/chat/completions"


def chat_router(engine: Engine, settings: ServeSettings, decoders: Decoders) -> APIRouter:
    """The endpoint's router."""
    router, limits = json_router(), settings.limits

    @router.post(
        CHAT,
        response_model=ChatResponse,
        response_model_exclude_none=True,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answers, and draws when the answer asks for it: about an image only where the message does too."""
        engine.check_open()
        check_model(body.model, settings)
        check_sampling(body, engine, limits, body.n, "n")
        inbox = Inbox(limits.deadline)
        job = await job_of(
            body,
            asked_of(_said(body.messages), "messages", limits),
            *(inbox, engine, decoders, limits, request),
            text_field="messages",
            count=body.n,
            most_tokens=body.max_completion_tokens or body.max_tokens,
            draws=None if body.modalities is None else "image" in body.modalities,
        )
        name = f"chatcmpl-{secrets.token_hex(12)}"
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks = _Chunks(name, settings.name, body.n)
            return EventStream(functools.partial(_write_events, chunks, usage, job, engine, inbox, request))
        result = await result_of(job, engine, inbox, request)
        choices = [
            Choice(
                index=i,
                message=AnswerMessage(content=result.text, images=_image_parts(result, i) if result.images else None),
                finish_reason=_finish_reason(result),
            )
            for i in range(body.n)
        ]
        created = int(time.time())
        return ChatResponse(id=name, created=created, model=settings.name, choices=choices, usage=_usage(result))

    return router


def _said(messages: Sequence[Message]) -> Iterator[Said]:
    """The messages, each with its field's name."""
    for i, message in enumerate(messages):
        name = f"messages.{i}.content"
        content: Any = [] if message.content is None else message.content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        if message.role == "assistant":
            shown = [(f"messages.{i}.images.{j}.image_url.url", p.image_url.url) for j, p in enumerate(message.images)]
        else:
            shown = [
                (f"{name}.{j}.image_url.url", part.image_url.url)
                for j, part in enumerate(parts)
                if isinstance(part, ImagePart)
            ]
        yield Said(message.role, name, text, shown)


# The answer ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunks:
    """Server-sent events of one completion with `count` choices."""

    name: str
    model: str
    count: int
    created: int = field(default_factory=lambda: int(time.time()))

    def event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        head = {"id": self.name, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

    def delta(self, values: dict[str, Any], index: int | None = None, reason: str | None = None) -> str:
        """The same delta for choice `index`, or for all of them."""
        indices = range(self.count) if index is None else (index,)
        return self.event([{"index": i, "delta": values, "finish_reason": reason, "logprobs": None} for i in indices])


async def _write_events(
    chunks: _Chunks,
    usage: bool,
    job: Job,
    engine: Engine,
    inbox: Inbox,
    request: Request,
    put: Callable[[str], Awaitable[None]],
) -> None:
    """Puts server-sent events: text as it is written, then images, then [DONE].

    Raises:
        Refused: when the job is not taken; nothing has been put then.
    """

    async def write() -> None:
        await put(chunks.delta({"role": "assistant", "content": ""}))
        while not isinstance(event := await inbox.get(PING), Result):
            await put(": working\n\n" if event is None else chunks.delta({"content": event}))
        if event.images:
            for i in range(job.count):
                parts = [part.model_dump(exclude_none=True) for part in _image_parts(event, i)]
                await put(chunks.delta({"images": parts}, i))
        await put(chunks.delta({}, reason=_finish_reason(event)))
        if usage:
            await put(chunks.event([], usage=_usage(event).model_dump()))
        await put("data: [DONE]\n\n")

    await put_events(job, engine, inbox, request, put, write, lambda error: f"data: {json.dumps({'error': error})}\n\n")


def _finish_reason(result: Result) -> Any:
    return "length" if result.cut_off else "stop"


def _image_parts(result: Result, index: int) -> list[ImagePart]:
    url = "data:image/png;base64," + base64.b64encode(result.images[index].file).decode("ascii")
    return [ImagePart(type="image_url", image_url=ImageURL(url=url))]


def _usage(result: Result) -> Usage:
    total = result.prompt_tokens + result.new_tokens
    return Usage(prompt_tokens=result.prompt_tokens, completion_tokens=result.new_tokens, total_tokens=total)
