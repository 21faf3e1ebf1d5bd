"""The settings of a server, its limits, and names that several of its modules use. Nothing here needs torch or fastapi."""

from __future__ import annotations

from dataclasses import dataclass, field

from scale_rae.options import PROMPT_PREFIX, ModelChoice

API_KEY_VARIABLE = "SCALE_RAE_API_KEY"
OWN_JUDGEMENT = "answer"  # in place of a reward's name: the model's own yes or no about what it drew
HEALTH, READY, METRICS = "/health", "/ready", "/metrics"  # paths that are not logged
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # hosts that are this machine itself
SEED_BITS = 31  # of seeds that requests leave to the server, which every client's integers hold
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much all requests together may take."""

    # Connections (connections.py)
    connections: int = 512  # open at once; the next gets 503
    connections_each: int = 128  # per client; the next gets 429
    headers: float = 10.0  # seconds for the head of a request to arrive
    head: int = 32 * 2**10  # bytes in the head of a request
    chunks: int = 4_096  # in a body that comes in chunks
    # Bodies, before they are parsed (guard.py)
    body: int = 32 * 2**20  # bytes
    bodies: int = 256 * 2**20  # bytes of all bodies in memory; the next gets 429
    upload: float = 30.0  # seconds for a body to arrive
    items: int = 16_384  # commas and opening brackets in a body, besides as many as `prompt` has characters
    # Requests (routes)
    prompt: int = 16_000  # characters of all text in a request
    images: int = 8  # sent in a request
    drawings: int = 16  # images to draw for a request, with those that best_of drops
    steps: int = 250
    new_tokens: int = 1024
    # Images that are sent (decoding.py)
    pixels: int = 25_000_000  # per image
    decoders: int = 2  # processes that decode images
    decoding: float = 15.0  # seconds to decode an image
    quick: float = 3.0  # seconds after which an image gives its decoder to the next one, to begin again later
    # The queue (engine.py) and the wait for a result (streaming.py)
    requests: int = 128  # waiting or under way; the next gets 429
    deadline: float = 300.0  # seconds from the arrival of a request to its answer, and again for the client to read it


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
    limits: Limits = field(default_factory=Limits)
