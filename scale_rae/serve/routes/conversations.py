"""Conversations as the model gets them; the endpoints for chat have different forms of the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from scale_rae.prompt import SYSTEM, Turn
from scale_rae.serve.decoding import Decoders
from scale_rae.serve.engine import Engine
from scale_rae.serve.refusals import invalid
from scale_rae.serve.routes.checks import check_text
from scale_rae.serve.settings import Limits
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


async def pixels_of(asked: Asked, engine: Engine, decoders: Decoders, client: str) -> Tensor | None:
    """The images [N, 3, H, W], preprocessed at once, so that no large image is held while its request waits."""
    if not asked.images:
        return None
    import torch

    def preprocess(image: Image.Image) -> Tensor:
        return engine.model.encoder.preprocess([image])

    return torch.cat([await decoders.read(url, name, client, preprocess) for name, url in asked.images])


def draws(asked: Asked, wanted: bool | None) -> bool:
    """Whether an image that the answer begins is drawn: as `wanted`, else not where an image is asked about."""
    last = asked.turns[-1]
    return wanted if wanted is not None else not last.images or asks_to_draw(last.text)
