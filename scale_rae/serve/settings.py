"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from scale_rae.options import PROMPT_PREFIX, ModelChoice

API_KEY_VARIABLE = "SCALE_RAE_API_KEY"
OWN_JUDGEMENT = "answer"  # in place of a reward's name: the model's own yes or no about what it drew
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # hosts that are this machine itself
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much all of them may take."""

    requests: int = 128  # waiting or under way; the next gets 429
    deadline: float = 300.0  # seconds from a request's arrival to its answer, and that a client may take to read it
    connections: int = 512  # open at once; the next gets 503
    connections_each: int = 128  # of one client; the next gets 429
    headers: float = 10.0  # seconds that a request's head may take to arrive
    head: int = 32 * 2**10  # bytes of a request's head
    body: int = 32 * 2**20  # bytes
    bodies: int = 256 * 2**20  # bytes of all that are held at once; the next gets 429
    upload: float = 30.0  # seconds that a body may take to arrive
    chunks: int = 4_096  # of a body that comes in chunks
    items: int = 16_384  # commas and opening brackets in a body, besides as many as `prompt` has characters
    prompt: int = 16_000  # characters of all text in a request
    pixels: int = 25_000_000  # of one image
    images: int = 8  # in a request
    decoders: int = 2  # processes that decode images
    decoding: float = 15.0  # seconds that one image may take to decode
    quick: float = 3.0  # seconds of that after which an image gives its decoder to others, and begins again later
    drawings: int = 16  # that a request has drawn, those that best_of drops included
    steps: int = 250
    new_tokens: int = 1024


@dataclass(frozen=True)
class ServeSettings:
    """A server: its model, where it listens, who may ask, and how much."""

    choice: ModelChoice
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    name: str = "scale-rae"  # the model's, as clients call it
    rewards: tuple[str, ...] = ()
    reward_path: str | None = None
    prompt_prefix: str = PROMPT_PREFIX  # before prompts of /v1/images/generations
    batch_size: int | None = None
    warm_up: bool | None = None  # None: on CUDA
    debug: bool = False
    limits: Limits = field(default_factory=Limits)
