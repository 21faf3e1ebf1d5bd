"""POST /v1/responses: OpenAI's newer interface for what /v1/chat/completions does. The server keeps no answers."""

from __future__ import annotations

import base64
import functools
import itertools
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
    DrawnImage,
    InputImage,
    InputMessage,
    OutputImage,
    OutputMessage,
    ResponsesRequest,
    ResponsesResponse,
)
from scale_rae.serve.settings import ServeSettings
from scale_rae.serve.streaming import PING, EventStream, put_events, result_of

RESPONSES = "/v1/responses"


def responses_router(engine: Engine, settings: ServeSettings, decoders: Decoders) -> APIRouter:
    """The endpoint's router."""
    router, limits = json_router(), settings.limits

    @router.post(
        RESPONSES,
        response_model=ResponsesResponse,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def responses(body: ResponsesRequest, request: Request) -> Any:
        """Answers, and draws when the answer asks for it: about an image only where the message does too."""
        engine.check_open()
        check_model(body.model, settings)
        check_sampling(body, engine, limits, 1, "input")
        inbox = Inbox(limits.deadline)
        job = await job_of(
            body,
            asked_of(_said(body), "input", limits),
            *(inbox, engine, decoders, limits, request),
            text_field="input",
            most_tokens=body.max_output_tokens,
            draws=False if body.tool_choice == "none" else None if body.tools is None else bool(body.tools),
        )
        answer = _Answer(body, settings.name)
        if body.stream:
            return EventStream(functools.partial(_write_events, answer, job, engine, inbox, request))
        return answer.complete(await result_of(job, engine, inbox, request))

    return router


# The request -----------------------------------------------------------------------------------------------------------------


def _said(body: ResponsesRequest) -> Iterator[Said]:
    """The messages, each with its field's name. An image that was drawn belongs to the model's words before it."""
    if body.instructions is not None:
        yield Said("system", "instructions", body.instructions, [])
    if isinstance(body.input, str):
        yield Said("user", "input", body.input, [])
        return
    waiting: Said | None = None  # the model's words, to which images may still be added
    for i, item in enumerate(body.input):
        if isinstance(item, DrawnImage):
            waiting = waiting or Said("assistant", f"input.{i}", "", [])
            waiting.images.append((f"input.{i}.result", f"data:image/png;base64,{item.result}"))
            continue
        if waiting is not None:
            yield waiting
            waiting = None
        said = _message(item, f"input.{i}.content")
        if item.role == "assistant":
            waiting = said
        else:
            yield said
    if waiting is not None:
        yield waiting


def _message(item: InputMessage, name: str) -> Said:
    if isinstance(item.content, str):
        return Said(item.role, name, item.content, [])
    text = "\n".join(part.text for part in item.content if not isinstance(part, InputImage))
    shown = [
        (f"{name}.{j}.image_url", part.image_url) for j, part in enumerate(item.content) if isinstance(part, InputImage)
    ]
    return Said(item.role, name, text, shown)


# The answer ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """One answer, and the server-sent events that lead to it; each event has a number."""

    body: ResponsesRequest
    model: str
    name: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    message: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def response(self, status: Any = "in_progress", **more: Any) -> ResponsesResponse:
        body = self.body
        return ResponsesResponse(
            id=self.name,
            created_at=self.created,
            status=status,
            model=self.model,
            instructions=body.instructions,
            metadata=body.metadata or {},
            tool_choice=body.tool_choice or "auto",
            tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            **more,
        )

    def complete(self, result: Result) -> ResponsesResponse:
        """The whole answer."""
        used = {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": result.new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": result.prompt_tokens + result.new_tokens,
        }
        return self.response(
            "incomplete" if result.cut_off else "completed",
            incomplete_details={"reason": "max_output_tokens"} if result.cut_off else None,
            output=[self.words(result.text, "incomplete" if result.cut_off else "completed"), *_images(result)],
            usage=used,
        )

    def words(self, text: str | None, status: Any) -> OutputMessage:
        return OutputMessage(id=self.message, status=status, content=[] if text is None else [_part(text)])

    def event(self, kind: str, **values: Any) -> str:
        data = {"type": kind, "sequence_number": next(self.numbers), **values}
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    def text_event(self, kind: str, **values: Any) -> str:
        return self.event(kind, item_id=self.message, output_index=0, content_index=0, **values)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _images(result: Result) -> list[OutputImage]:
    return [
        OutputImage(
            id=f"ig_{secrets.token_hex(12)}",
            status="completed",
            result=base64.b64encode(image.file).decode("ascii"),
            seed=image.seed,
        )
        for image in result.images
    ]


async def _write_events(
    answer: _Answer,
    job: Job,
    engine: Engine,
    inbox: Inbox,
    request: Request,
    put: Callable[[str], Awaitable[None]],
) -> None:
    """Puts server-sent events: text as it is written, then images, then the whole answer.

    Raises:
        Refused: when the job is not taken; nothing has been put then.
    """

    async def write() -> None:
        begun = answer.response().model_dump()
        for kind in ("response.created", "response.in_progress"):
            await put(answer.event(kind, response=begun))
        item = answer.words(None, "in_progress").model_dump()
        await put(answer.event("response.output_item.added", output_index=0, item=item))
        await put(answer.text_event("response.content_part.added", part=_part("")))
        while not isinstance(event := await inbox.get(PING), Result):
            if event is None:
                await put(": working\n\n")
            else:
                await put(answer.text_event("response.output_text.delta", delta=event, logprobs=[]))
        whole = answer.complete(event)
        await put(answer.text_event("response.output_text.done", text=event.text, logprobs=[]))
        await put(answer.text_event("response.content_part.done", part=_part(event.text)))
        await _put_items(answer, whole.output, put)
        await put(answer.event(f"response.{whole.status}", response=whole.model_dump()))

    def failed(error: dict[str, Any]) -> str:
        return answer.event("error", code=error["code"], message=error["message"], param=error["param"])

    await put_events(job, engine, inbox, request, put, write, failed)


async def _put_items(
    answer: _Answer, items: Sequence[OutputMessage | OutputImage], put: Callable[[str], Awaitable[None]]
) -> None:
    for index, item in enumerate(items):
        value = item.model_dump()
        if isinstance(item, OutputImage):
            started = {**value, "status": "in_progress", "result": None}
            await put(answer.event("response.output_item.added", output_index=index, item=started))
            await put(answer.event("response.image_generation_call.completed", output_index=index, item_id=item.id))
        await put(answer.event("response.output_item.done", output_index=index, item=value))
