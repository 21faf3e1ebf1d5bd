"""What a scaling run reports while it goes on: one frozen dataclass per kind of event."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from scale_rae.errors import printable
from scale_rae.jsonio import dump_json, parse_json


@dataclass(frozen=True)
class Planned:
    """A run begins: how many prompts it draws, how many are finished already, images per prompt, workers."""

    todo: int
    finished: int
    images_per_prompt: int
    workers: int


@dataclass(frozen=True)
class WorkerLoaded:
    """A worker has loaded its models."""

    worker: int
    device: str


@dataclass(frozen=True)
class ImagesDrawn:
    """Images of some prompt are drawn, scored and written."""

    count: int


@dataclass(frozen=True)
class PromptFinished:
    """All images of a prompt are there; `drawn` of them are new.

    `seconds` holds the time per stage and in "total".
    """

    index: int
    prompt: str
    images: int
    yes: int  # images that the model says yes to
    drawn: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptFailed:
    """A prompt cannot be drawn in this run."""

    index: int
    error: str


@dataclass(frozen=True)
class Message:
    """A line for the person who reads the terminal."""

    text: str


@dataclass(frozen=True)
class WorkerFinished:
    """A worker process has ended well; `seconds` per stage."""

    seconds: dict[str, float]


@dataclass(frozen=True)
class WorkerFailed:
    """A worker process ends with an error; `kind` is the name of the error's class."""

    error: str
    kind: str


Event: TypeAlias = (
    Planned | WorkerLoaded | ImagesDrawn | PromptFinished | PromptFailed | Message | WorkerFinished | WorkerFailed
)
Listener: TypeAlias = Callable[[Event], None]
E = TypeVar("E", bound=Event)

_KINDS: dict[str, type[Event]] = {
    "planned": Planned,
    "loaded": WorkerLoaded,
    "images": ImagesDrawn,
    "prompt": PromptFinished,
    "failed": PromptFailed,
    "message": Message,
    "finished": WorkerFinished,
    "error": WorkerFailed,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_json(event: Event) -> str:
    """An event as a line of JSON, without the line's end."""
    return dump_json({"event": _NAMES[type(event)], **dataclasses.asdict(event)})


def from_json(line: str) -> Event:
    """The event that `to_json` wrote.

    Raises:
        ValueError: for anything else, such as half a line.
    """
    value: Any = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError("an event is a JSON object")
    kind = _KINDS.get(value.pop("event", ""))
    if kind is None or value.keys() != {f.name for f in dataclasses.fields(kind)}:
        raise ValueError("not an event")
    return kind(**value)


def printable_event(event: E) -> E:
    """The event without control characters in its texts, which come from prompts, models and files."""
    texts: dict[str, Any] = {
        name: printable(value, lines=True) for name, value in vars(event).items() if isinstance(value, str)
    }
    return dataclasses.replace(event, **texts)
