"""Waits for a job while its client stays and its time lasts; the response that streams server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from scale_rae.serve.engine import Engine
from scale_rae.serve.errors import answer_to
from scale_rae.serve.guard import LEFT
from scale_rae.serve.jobs import Inbox, Job, Result
from scale_rae.serve.refusals import Refused, client_left

PING = 15.0  # seconds of silence after which a stream shows that it is alive


async def result_of(job: Job, engine: Engine, inbox: Inbox, request: Request) -> Result:
    """The result of a job that this submits.

    Raises:
        Refused: when it is not taken, its client leaves (499), or its time is over (504).
    """
    async with attended(request, inbox.deadline):
        engine.submit(job)
        try:
            while not isinstance(event := await inbox.get(), Result):
                pass
            return event
        finally:
            engine.cancel(job)


@contextlib.asynccontextmanager
async def attended(request: Request, deadline: float) -> AsyncIterator[None]:
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
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def put_events(
    job: Job,
    engine: Engine,
    inbox: Inbox,
    request: Request,
    put: Callable[[str], Awaitable[None]],
    write: Callable[[], Awaitable[None]],
    failed: Callable[[dict[str, Any]], str],
) -> None:
    """Submits a job and runs `write`, which puts its events; after an error, puts `failed` of OpenAI's error object.

    Raises:
        Refused: when the job is not taken; nothing has been put then.
    """
    engine.submit(job)
    try:
        async with attended(request, inbox.deadline):
            await write()
    except Exception as e:
        status, body, _ = answer_to(e)
        if status == 499:
            request.scope[LEFT] = True
        else:
            if status == 500:
                engine.report(e)
            await put(failed(body["error"]))
    finally:
        engine.cancel(job)


class EventStream(StreamingResponse):
    """Server-sent events that one coroutine writes, so that whatever ends the coroutine ends all that it began."""

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
