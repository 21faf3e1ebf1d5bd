from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import faulthandler
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from scale_rae.options import ModelChoice
from scale_rae.pipeline import ScaleRAE
from scale_rae.rewards import Reward, load_reward
from scale_rae.serve.engine import Engine
from scale_rae.serve.server import Server, bind
from scale_rae.serve.settings import Limits, ServeSettings
from tests.helpers.late import Late

if TYPE_CHECKING:
    from openai import OpenAI

openai: Any = Late("openai")

CIRCLE = "Can you generate a photo of a red circle?"
SLOW: dict[str, Any] = {"prompt": CIRCLE, "steps": 120}  # seconds of work
HANGS = 240.0  # seconds after which something hangs, however busy the machine is


@dataclass
class Running:
    """A server in this process, on a port of its own."""

    server: Server
    engine: Engine
    port: int
    thread: threading.Thread = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", retries: int = 0) -> OpenAI:
        client: OpenAI = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries)
        return client

    def metric(self, name: str, **labels: str) -> float:
        return self.engine.metrics.registry.get_sample_value(name, labels) or 0.0

    def wait_for(self, what: Callable[[], bool]) -> None:
        end = time.monotonic() + HANGS
        while not what():
            assert time.monotonic() < end, "it does not happen"
            time.sleep(0.005)

    def wait_idle(self) -> None:
        self.wait_for(lambda: self.engine.idle)


Serve = Callable[..., contextlib.AbstractContextManager[Running]]


@contextlib.contextmanager
def serving(
    model: ScaleRAE,
    limits: Limits | None = None,
    rewards: dict[str, Reward] | None = None,
    load: Callable[[], tuple[ScaleRAE, dict[str, Reward]]] | None = None,
    wait: bool = True,
    **options: Any,
) -> Iterator[Running]:
    """Serves a model that is there already."""
    settings = ServeSettings(ModelChoice("shapes"), port=0, name="shapes", limits=limits or Limits(), **options)
    engine = Engine(
        load or (lambda: (model, rewards or {})), most_jobs=settings.limits.requests, batch_size=settings.batch_size
    )
    listener = bind(settings.host, 0)
    port = listener.getsockname()[1]
    server = Server(engine, settings)
    engine.start()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    running = Running(server, engine, port, thread)
    try:
        if wait:
            assert engine.loaded.wait(HANGS)
            assert engine.error is None
        yield running
    finally:
        engine.close()
        server.should_exit = True
        thread.join(HANGS)
        if thread.is_alive():
            faulthandler.dump_traceback()
        assert not thread.is_alive()


def paused(model: ScaleRAE) -> tuple[ScaleRAE, threading.Event]:
    """A copy of the model whose drawings end only once the event is set: they last, and compute little."""
    drawn, go = copy.copy(model), threading.Event()

    def sample(*args: Any, **options: Any) -> Any:
        latents = model.sample(*args, **options)
        assert go.wait(HANGS)
        return latents

    drawn.sample = sample
    drawn.exact_batch = model.exact_batch
    return drawn, go


@pytest.fixture(scope="session")
def shapes() -> ScaleRAE:
    return ScaleRAE.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="session")
def siglip(shapes: ScaleRAE) -> Reward:
    return load_reward("siglip", shapes)


@pytest.fixture
def serve(shapes: ScaleRAE) -> Serve:
    return lambda **options: serving(shapes, **options)


@pytest.fixture(scope="session")
def running(shapes: ScaleRAE, siglip: Reward) -> Iterator[Running]:
    with serving(shapes, rewards={"siglip": siglip}) as server:
        yield server


def picture(b64: str) -> np.ndarray[Any, Any]:
    """Pixels of a base64 PNG."""
    with Image.open(io.BytesIO(base64.b64decode(b64))) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def data_url(image: Image.Image, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return f"data:image/{format.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def alone(model: ScaleRAE, prompt: str, seed: int, **options: Any) -> np.ndarray[Any, Any]:
    """Pixels of a prompt drawn by itself."""
    image = model.generate(prompt, image_seeds=None, seed=seed, batch_size=1, **options).images[0].image
    assert image is not None
    return np.asarray(image)


ROOT = Path(__file__).parents[2]
