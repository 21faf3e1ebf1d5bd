"""The server's settings and limits, and names that several of its modules use. Imports no torch or fastapi."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from scale_rae.options import PROMPT_PREFIX, Knob, ModelChoice

API_KEY_VARIABLE = "SCALE_RAE_API_KEY"
OWN_JUDGEMENT = "answer"  # in place of a reward's name: the model's own yes or no about what it drew
HEALTH, READY, METRICS = "/health", "/ready", "/metrics"  # paths that are not logged
HOME, PICTURE_FILES = "/", "/v1/images/files"
DOCS, OPENAPI = "/docs", "/openapi.json"
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # hosts that are this machine itself
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
LIMITS = "Limits"  # heading in --help
KIB, MIB = 2**10, 2**20


def _limit(help: str, least: float, name: str = "", most: float | None = None, unit: int = 1) -> Knob:
    return Knob(help, LIMITS, name, least=least, most=most, unit=unit, show_range=True)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much all requests together may take."""

    # Connections (connections.py)
    connections: Annotated[int, _limit("Connections open at once; more get 503.", 1, name="max_connections")] = 512
    connections_each: Annotated[
        int, _limit("Connections of one client; more get 429.", 1, name="max_client_connections")
    ] = 128
    headers: Annotated[float, _limit("Seconds that a request's head may take to arrive.", 0.1, name="header_time")] = (
        10.0
    )
    head: Annotated[int, _limit("KiB of a request's head.", 4 * KIB, name="max_header", unit=KIB)] = 32 * KIB
    chunks: int = 4_096  # in a body that comes in chunks
    # Bodies, before they are parsed (guard.py)
    body: Annotated[int, _limit("MiB of a request's body.", MIB, name="max_body", unit=MIB)] = 32 * MIB
    bodies: Annotated[
        int, _limit("MiB of all bodies held at once; more get 429.", MIB, name="max_bodies", unit=MIB)
    ] = 256 * MIB
    upload: Annotated[float, _limit("Seconds that a request's body may take to arrive.", 0.1, name="upload_time")] = (
        30.0
    )
    # Counted: commas and opening brackets, besides as many as `prompt` has characters.
    items: Annotated[int, _limit("Lists, objects and members in a request's JSON.", 100, name="max_items")] = 16_384
    # Requests (routes)
    prompt: Annotated[int, _limit("Characters of all text in a request.", 1, name="max_prompt")] = 16_000
    images: Annotated[int, _limit("Images sent in a request.", 1, name="max_pictures")] = 8
    # Images to draw, with those that best_of drops.
    drawings: Annotated[int, _limit("Images that a request may have drawn.", 1, name="max_images", most=64)] = 16
    steps: Annotated[int, _limit("Steps of the solver.", 1, name="max_steps")] = 250
    # Pictures that answers link to (links.py)
    linked: Annotated[float, _limit("Seconds that pictures sent as URLs are kept.", 1, name="url_time")] = 3600.0
    links: Annotated[
        int, _limit("MiB of all pictures that are kept for URLs.", MIB, name="max_url_memory", unit=MIB)
    ] = 256 * MIB
    new_tokens: Annotated[int, _limit("Longest reply, in tokens.", 1, name="max_new_tokens")] = 1024
    # Images that are sent (decoding.py)
    pixels: Annotated[int, _limit("Pixels of an image sent.", 1, name="max_pixels")] = 25_000_000
    decoders: Annotated[int, _limit("Processes that decode images sent.", 1)] = 2
    decoding: Annotated[float, _limit("Seconds that an image sent may take to decode.", 0.1, name="decode_time")] = 15.0
    quick: float = 3.0  # seconds after which an image gives its decoder to the next one, to begin again later
    # The queue (engine.py) and the wait for a result (streaming.py)
    requests: Annotated[
        int, _limit("Requests that may wait or be under way; more get 429.", 1, name="max_requests")
    ] = 128
    # Again as many seconds are a client's to read its answer.
    deadline: Annotated[float, _limit("Seconds from a request to its answer.", 0.1)] = 300.0


@dataclass(frozen=True)
class ServeSettings:
    """A server's model, address, key and limits."""

    choice: ModelChoice
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    name: str = "scale-rae"  # of the model, in requests and answers
    rewards: tuple[str, ...] = ()
    reward_path: str | None = None
    prompt_prefix: str = PROMPT_PREFIX  # before prompts of /v1/images/generations
    batch_size: int | None = None
    warm_up: bool | None = None  # None: on CUDA
    debug: bool = False
    docs: bool = False  # whether /docs has a page to try the routes
    limits: Limits = field(default_factory=Limits)
