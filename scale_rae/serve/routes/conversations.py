"""Conversations as the model gets them; the endpoints for chat have different forms of the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastapi import Request
from PIL import Image
from torch import Tensor

from scale_rae.noise import new_seed
from scale_rae.prompt import SYSTEM, Turn
from scale_rae.serve.decoding import Decoders
from scale_rae.serve.engine import Engine
from scale_rae.serve.jobs import Inbox, Job
from scale_rae.serve.refusals import invalid
from scale_rae.serve.routes.checks import check_text, client_name
from scale_rae.serve.schema import ChatRequest, ResponsesRequest
from scale_rae.serve.settings import Limits
from scale_rae.serve.streaming import attended
from scale_rae.wording import asks_to_draw


@dataclass(frozen=True)
class Said:
    """One message: who said it, the name of the request's field, its text, and its images as (field, data URL)."""

    role: str
    name: str
    text: str
    images: list[tuple[str, str]]


@dataclass(frozen=True)
class Asked:
    """A conversation as the model gets it. `images`: (field, data URL) in the order of the turns."""

    turns: list[Turn] = field(default_factory=list)
    system: str = SYSTEM
    images: list[tuple[str, str]] = field(default_factory=list)


def asked_of(messages: Iterable[Said], name: str, limits: Limits) -> Asked:
    """The conversation of the messages in a request's field `name`.

    Raises:
        Refused: naming the field of the first violation.
    """
    turns: list[Turn] = []
    urls: list[tuple[str, str]] = []
    system: list[str] = []
    length = 0
    for said in messages:
        length += len(said.text)
        may_be_empty = said.role != "user" or said.images
        check_text(said.text or "-" if may_be_empty else said.text, length, said.name, limits)
        if said.role in ("user", "assistant"):
            turns.append(Turn(said.role, said.text, len(said.images)))
        else:
            system.append(said.text)
        urls += said.images
        if len(urls) > limits.images:
            raise invalid(said.images[-1][0], f"more than {limits.images} images in a request")
    if not turns or turns[-1].role != "user":
        raise invalid(name, "the last one must be a user's")
    return Asked(turns, "\n".join(system) or SYSTEM, urls)


async def job_of(
    body: ChatRequest | ResponsesRequest,
    asked: Asked,
    inbox: Inbox,
    engine: Engine,
    decoders: Decoders,
    limits: Limits,
    request: Request,
    *,
    text_field: str,
    count: int = 1,
    most_tokens: int | None = None,
    draws: bool | None = None,
) -> Job:
    """The job of a conversation, with its images decoded.

    `draws`: whether an image that the answer begins is drawn; None: not where an image is asked about.

    Raises:
        Refused: naming the field of an image that cannot be read; when the client leaves or the time is over.
    """
    client, last = client_name(request), asked.turns[-1]
    async with attended(request, inbox.deadline):
        pixels = await _pixels_of(asked, engine, decoders, client)
    return Job(
        asked.turns,
        pixels,
        body.options(limits.steps, engine.model.config.student),
        new_seed() if body.seed is None else body.seed,
        inbox.put,
        inbox.deadline,
        count=count,
        best_of=count,
        system=asked.system,
        max_new_tokens=min(most_tokens or limits.new_tokens, limits.new_tokens),
        draws=draws if draws is not None else not last.images or asks_to_draw(last.text),
        text_field=text_field,
        streams=bool(body.stream),
        client=client,
    )


async def _pixels_of(asked: Asked, engine: Engine, decoders: Decoders, client: str) -> Tensor | None:
    """The images [N, 3, H, W], preprocessed at once, so that no large image is held while its request waits."""
    if not asked.images:
        return None
    import torch

    def preprocess(image: Image.Image) -> Tensor:
        return engine.model.encoder.preprocess([image])

    return torch.cat([await decoders.read(url, name, client, preprocess) for name, url in asked.images])
