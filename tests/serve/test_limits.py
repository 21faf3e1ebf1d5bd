"""What is refused, dropped and ended, and what errors and logs say and do not say."""

from __future__ import annotations

import base64
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image

from scale_rae.errors import CheckpointError, DeviceError
from scale_rae.options import SamplingOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import Turn
from scale_rae.serve.engine import Engine
from scale_rae.serve.jobs import Job, Result
from scale_rae.serve.refusals import Refused
from scale_rae.serve.schedule import BatchSizes
from scale_rae.serve.settings import Limits
from tests.helpers.png import png_of_size
from tests.serve.conftest import CIRCLE, HANGS, SLOW, Running, Serve, data_url, openai, paused, picture, serving

IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, JSON, headers)"""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | (headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=HANGS) as answer:
            return answer.status, json.load(answer), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as e:
        return e.code, json.load(e), {k.lower(): v for k, v in e.headers.items()}


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=HANGS) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def ask(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, *parts]}]}


def held(running: Running) -> int:
    """Bytes of bodies in the server."""
    guard: Any = running.server.config.app
    return int(guard.held)


def bomb(width: int, height: int) -> str:
    return "data:image/png;base64," + base64.b64encode(png_of_size(width, height)).decode()


CUT_SHORT = data_url(Image.effect_noise((64, 64), 50))[:-400]

USER = {"role": "user", "content": "hi"}
VIOLATIONS: list[tuple[str, Any, str]] = [
    (IMAGES, {}, "prompt"),
    (IMAGES, {"prompt": ""}, "prompt"),
    (IMAGES, {"prompt": "  "}, "prompt"),
    (IMAGES, {"prompt": 5}, "prompt"),
    (IMAGES, {"prompt": "x" * 20_000}, "prompt"),
    (IMAGES, {"prompt": "word " * 3000}, "prompt"),  # too many tokens
    (IMAGES, {"prompt": "a", "n": 0}, "n"),
    (IMAGES, {"prompt": "a", "n": 33}, "n"),
    (IMAGES, {"prompt": "a", "n": "two"}, "n"),
    (IMAGES, {"prompt": "a", "seed": -1}, "seed"),
    (IMAGES, {"prompt": "a", "seed": 2**63}, "seed"),
    (IMAGES, {"prompt": "a", "seed": 1.5}, "seed"),
    (IMAGES, {"prompt": "a", "size": "1024x1024"}, "size"),
    (IMAGES, {"prompt": "a", "size": "big"}, "size"),
    (IMAGES, {"prompt": "a", "response_format": "file"}, "response_format"),
    (IMAGES, {"prompt": "a", "guidance": -1}, "guidance"),
    (IMAGES, {"prompt": "a", "guidance_interval": [0.5, 0.1]}, "guidance_interval"),
    (IMAGES, {"prompt": "a", "guidance_interval": [0.5]}, "guidance_interval.1"),
    (IMAGES, {"prompt": "a", "steps": 1}, "steps"),
    (IMAGES, {"prompt": "a", "steps": 251}, "steps"),
    (IMAGES, {"prompt": "a", "solver": "rk4"}, "solver"),
    (IMAGES, {"prompt": "a", "noise": "mps"}, "noise"),
    (IMAGES, {"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
    (IMAGES, {"prompt": "a", "best_of": 60}, "best_of"),
    (IMAGES, {"prompt": "a", "best_of": 2, "reward": "pickscore"}, "reward"),
    (IMAGES, {"prompt": "a", "reward": "answer"}, "reward"),
    (IMAGES, {"prompt": "a", "style": "vivid"}, "style"),
    (IMAGES, {"prompt": "a", "n": "2"}, "n"),
    (IMAGES, {"prompt": "a", "seed": True}, "seed"),
    (IMAGES, {"prompt": "a", "guidance": "3"}, "guidance"),
    (IMAGES, {"prompt": "a", "guidance": True}, "guidance"),
    (IMAGES, {"prompt": "a", "guidance_interval": ["0.1", 1]}, "guidance_interval.0"),
    (IMAGES, {"prompt": "a", "stream": 0}, "stream"),
    (CHAT, {"messages": [USER], "stream": "yes"}, "stream"),
    (CHAT, {"messages": [USER], "max_tokens": "3"}, "max_tokens"),
    (CHAT, {"messages": [USER], "temperature": "1"}, "temperature"),
    (CHAT, {"messages": [USER], "stream_options": {"include_usage": "on"}}, "stream_options.include_usage"),
    (IMAGES, {"prompt": "a", "model": "gpt-image-1"}, "model"),
    (IMAGES, [1, 2], "body"),
    (IMAGES, b"{", "body"),
    (IMAGES, b'{"prompt": "a", "guidance": NaN}', "guidance"),
    (IMAGES, b'{"prompt": "\\ud800"}', "prompt"),
    (IMAGES, {"prompt": "What is this?"}, "prompt"),  # the model draws nothing
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": " "}]}, "messages.0.content"),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages"),
    (CHAT, {"messages": [USER, {"role": "user", "content": "y" * 16_000}]}, "messages.1.content"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0"),
    (CHAT, {"messages": [USER | {"text": "x"}]}, "messages.0.text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    (
        CHAT,
        {"messages": [USER, {"role": "assistant", "images": [{"type": "image_url", "image_url": {}}]}, USER]},
        "messages.1.images.0.image_url.url",
    ),
    (CHAT, {"messages": [USER], "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": [USER], "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": [USER], "stop": ["x"]}, "stop"),
    (CHAT, {"messages": [USER], "n": 17}, "n"),
    (CHAT, ask("http://127.0.0.1/cat.png"), "messages.0.content.1.image_url.url"),
    (CHAT, ask("HTTPS://example.com/cat.png"), "messages.0.content.1.image_url.url"),
    (CHAT, ask("file:///etc/passwd"), "messages.0.content.1.image_url.url"),
    (CHAT, ask("/etc/passwd"), "messages.0.content.1.image_url.url"),
    (CHAT, ask("data:text/html;base64,AAAA"), "messages.0.content.1.image_url.url"),
    (CHAT, ask("data:image/png;base64,%%%"), "messages.0.content.1.image_url.url"),
    (CHAT, ask("data:image/png;base64,AAAA"), "messages.0.content.1.image_url.url"),
    (CHAT, ask(CUT_SHORT), "messages.0.content.1.image_url.url"),
    (CHAT, ask(bomb(50_000, 50_000)), "messages.0.content.1.image_url.url"),
    (CHAT, ask(bomb(6_000, 6_000)), "messages.0.content.1.image_url.url"),
    (CHAT, ask(bomb(100, 100)), "messages.0.content.1.image_url.url"),  # damaged
    (
        CHAT,
        ask(data_url(Image.new("RGB", (8, 8)), "TIFF").replace("tiff", "png")),
        "messages.0.content.1.image_url.url",
    ),
    (CHAT, ask(*[data_url(Image.new("RGB", (8, 8)))] * 9), "messages.0.content.9.image_url.url"),
]


def test_noise_of_a_gpu_is_refused_where_there_is_none(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, answer, _ = post(running.url + IMAGES, {"prompt": CIRCLE, "noise": "cuda"})
    assert (status, answer["error"]["param"]) == (400, "noise")
    assert "noise cuda: is drawn by a GPU" in answer["error"]["message"]


@pytest.mark.parametrize(("path", "body", "field"), VIOLATIONS, ids=lambda value: str(value)[:60])
def test_a_violation_is_a_4xx_that_names_the_field(running: Running, path: str, body: Any, field: str) -> None:
    status, answer, _ = post(running.url + path, body)
    error = answer["error"]
    assert status == (404 if field == "model" else 400), error
    assert error["param"] == field
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if field == "model" else "invalid_request_error")
    if "http" in json.dumps(body, default=str).lower():
        assert "data:image/png;base64" in error["message"]
    assert "/etc" not in json.dumps(answer)
    assert "word word" not in json.dumps(answer)


def test_a_body_without_its_type(running: Running) -> None:
    request = urllib.request.Request(running.url + IMAGES, b'{"prompt": "a"}', {"Content-Type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400
    error = json.load(caught.value)["error"]
    assert error["message"] == "body: is not a JSON object that comes with Content-Type: application/json"


def test_an_unknown_route_and_method(running: Running) -> None:
    assert get(running.url + "/v1/embeddings")[0] == 404
    assert json.loads(get(running.url + "/../../etc/passwd")[1])["error"]["message"] == "no such route"
    assert get(running.url + IMAGES)[0] == 405
    assert get(running.url + "/docs")[0] == 404


def test_a_large_body(serve: Serve) -> None:
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serve(limits=Limits(body=1000, upload=HANGS)) as running:
        assert post(running.url + IMAGES, {"prompt": "x" * 2000})[0] == 413
        with socket.create_connection(("127.0.0.1", running.port)) as connection:  # without saying how large it is
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(3):
                connection.sendall(b"190\r\n" + b"x" * 400 + b"\r\n")
            assert b" 413 " in connection.recv(4096)
    with (
        serve(limits=Limits(body=1000, upload=0.5)) as running,
        socket.create_connection(("127.0.0.1", running.port)) as connection,  # one that never ends
    ):
        connection.sendall(f"{head}Content-Length: 500\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(4096)


def test_many_bodies_at_once(serve: Serve) -> None:
    with serve(limits=Limits(body=1000, bodies=1500, upload=HANGS)) as running:
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as first:
            first.sendall(head.encode() + b"{" * 900)
            running.wait_for(lambda: held(running) == 900)
            with socket.create_connection(("127.0.0.1", running.port)) as second:
                second.sendall(head.encode() + b"{" * 900)
                answer = second.makefile("rb").read().lower()  # to the end: the server closes
                assert b" 429 " in answer
                assert b"retry-after" in answer
                assert b"uploads_full" in answer
            assert held(running) == 900
            assert post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2})[0] == 200  # a small one fits
        running.wait_for(lambda: held(running) == 0)


def test_bytes_that_are_no_text(running: Running) -> None:
    request = urllib.request.Request(
        running.url + IMAGES, b"\xff\xfe\x00", {"Content-Type": "application/json"}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400
    assert json.loads(caught.value.read())["error"]["param"] == "body"


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_for_the_head_alone(running: Running, path: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(running.url + path, method="HEAD")) as answer:
        assert answer.status == 200
        assert answer.read() == b""


def test_a_full_queue(shapes: ScaleRAE) -> None:
    model, go = paused(shapes)
    with serving(model, limits=Limits(requests=2)) as running, ThreadPoolExecutor(3) as pool:
        for i in range(2):
            pool.submit(post, running.url + IMAGES, {"prompt": CIRCLE, "seed": i, "steps": 2})
        running.wait_for(lambda: running.engine.jobs == 2)
        status, answer, headers = post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2})
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        assert answer["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            running.client().chat.completions.create(model="shapes", messages=[{"role": "user", "content": "hi"}])
        # A client that waits as it is told gets its picture.
        images = running.client(retries=8).images
        got = pool.submit(images.generate, prompt=CIRCLE, extra_body={"steps": 2})
        running.wait_for(lambda: running.metric("scale_rae_requests_total", route=IMAGES, status="429") == 2)
        go.set()
        assert got.result().data


def test_the_deadline(serve: Serve) -> None:
    with serve(limits=Limits(deadline=1.5)) as running:
        status, answer, headers = post(running.url + IMAGES, SLOW | {"n": 8, "steps": 250})
        assert status == 504
        assert answer["error"]["code"] == "deadline_exceeded"
        assert headers["x-should-retry"] == "false"
        running.wait_idle()
        with pytest.raises(openai.APIError, match="time limit"):
            list(
                running.client().chat.completions.create(
                    model="shapes",
                    messages=[{"role": "user", "content": CIRCLE}],
                    stream=True,
                    n=8,
                    extra_body={"steps": 250},
                )
            )
        assert running.metric("scale_rae_images_total") == 0
        # The threads are free again; a busy machine may need more than one try within the limit.
        running.wait_for(lambda: post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2})[0] == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_work_of_a_client_that_left_is_dropped(serve: Serve, stream: bool) -> None:
    with serve() as running:
        body = json.dumps({"messages": [{"role": "user", "content": CIRCLE}], "steps": 250, "n": 8, "stream": stream})
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", running.port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        running.wait_for(lambda: running.metric("scale_rae_batch_size_count", stage="draw") > 0)
        connection.close()
        running.wait_idle()
        assert post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2})[0] == 200
        assert running.metric("scale_rae_images_total") == 1
        running.wait_for(lambda: running.metric("scale_rae_requests_total", route=CHAT, status="499") == 1)


def test_shutting_down(shapes: ScaleRAE) -> None:
    model, go = paused(shapes)
    with serving(model) as running, ThreadPoolExecutor(8) as pool:
        first = pool.submit(post, running.url + IMAGES, {"prompt": CIRCLE, "steps": 2})
        running.wait_for(lambda: running.metric("scale_rae_batch_size_count", stage="draw") > 0)
        body = {"prompt": CIRCLE, "steps": 2}
        waiting = [pool.submit(post, running.url + IMAGES, body | {"seed": i}) for i in range(3)]
        running.wait_for(lambda: running.engine.jobs == 4)
        running.server.stop()
        running.wait_for(lambda: running.engine.draining)
        assert get(running.url + "/ready")[0] == 503
        assert get(running.url + "/health")[0] == 200
        status, answer, headers = post(running.url + IMAGES, {"prompt": CIRCLE})
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in headers
        go.set()
        assert {f.result()[0] for f in waiting} == {503}
        status, answer, _ = first.result()
        assert status == 200
        assert picture(answer["data"][0]["b64_json"]).shape == (128, 128, 3)
        running.thread.join(HANGS)
        assert not running.thread.is_alive()


def test_what_waits_to_be_drawn_is_refused_too(shapes: ScaleRAE) -> None:
    """Its reply is there already, which nobody has seen."""
    with serving(shapes) as running, ThreadPoolExecutor(16) as pool:
        engine = running.engine
        asked = [pool.submit(post, running.url + IMAGES, {"prompt": CIRCLE, "n": 4, "steps": 20}) for _ in range(16)]
        running.wait_for(lambda: engine.waiting_to_draw > 8)
        assert running.metric("scale_rae_requests_waiting") > 4
        running.server.stop()
        statuses = [f.result()[0] for f in asked]
        assert set(statuses) == {200, 503}
        assert statuses.count(503) > 4
        running.thread.join(HANGS)
        assert not running.thread.is_alive()


def test_while_loading(shapes: ScaleRAE) -> None:
    go = threading.Event()

    def load() -> tuple[ScaleRAE, dict[str, Any]]:
        assert go.wait(HANGS)
        return shapes, {}

    with serving(shapes, load=load, wait=False) as running:
        assert get(running.url + "/health")[0] == 200
        assert get(running.url + "/ready")[0] == 503
        assert get(running.url + "/metrics")[0] == 200
        assert post(running.url + IMAGES, {"prompt": CIRCLE})[1]["error"]["code"] == "loading"
        go.set()
        running.wait_for(lambda: get(running.url + "/ready")[0] == 200)


def test_a_model_that_cannot_be_loaded_ends_the_server(shapes: ScaleRAE) -> None:
    def load() -> Any:
        raise CheckpointError("no such weights")

    with serving(shapes, load=load, wait=False) as running:
        running.thread.join(HANGS)
        assert not running.thread.is_alive()
        assert isinstance(running.engine.error, CheckpointError)


def test_the_api_key(serve: Serve) -> None:
    with serve(api_key="s3cret-key") as running:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert get(running.url + path)[0] == 401
            assert get(running.url + path, {"Authorization": "Bearer s3cret-kez"})[0] == 401
            assert get(running.url + path, {"Authorization": "s3cret-key"})[0] == 401
            assert get(running.url + path, {"Authorization": "Bearer s3cret-key"})[0] == 200
        assert get(running.url + "/health")[0] == get(running.url + "/ready")[0] == 200
        status, answer, headers = post(running.url + IMAGES, {"prompt": CIRCLE}, {"Authorization": "Bearer no"})
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert "s3cret" not in json.dumps(answer)
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").models.list()
        assert running.client("s3cret-key").images.generate(prompt=CIRCLE, extra_body={"steps": 2}).data


def test_another_sites_page_cannot_reach_a_server_without_a_key(running: Running) -> None:
    assert post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2}, {"Host": "evil.example:8000"})[0] == 403
    assert post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2}, {"Content-Type": "text/plain"})[0] == 400
    assert post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2}, {"Host": "localhost:1"})[0] == 200
    assert get(running.url + "/health", {"Host": "[::1]:80"})[0] == 200


def test_a_defect_says_nothing_of_the_request(
    shapes: ScaleRAE, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a photo of my very secret unicorn"
    with serving(shapes, api_key="s3cret-key") as running:
        key = {"Authorization": "Bearer s3cret-key"}
        post(running.url + IMAGES, {"prompt": secret, "steps": 2}, key)
        post(running.url + IMAGES, {"prompt": secret, "steps": "no"}, key)
        get(f"{running.url}/v1/models/{secret.replace(' ', '%20')}?prompt=unicorn", key)
        get(f"{running.url}/unicorn", key)

        def broken(*args: Any, **options: Any) -> Any:
            raise RuntimeError(f"cannot draw {secret} from /home/me/weights")

        monkeypatch.setattr(shapes, "sample", broken)
        status, answer, _ = post(running.url + IMAGES, {"prompt": CIRCLE}, key)
        assert status == 500
        monkeypatch.undo()
        monkeypatch.setattr("scale_rae.serve.routes.images.check_text", broken)
        status, other, _ = post(running.url + IMAGES, {"prompt": CIRCLE}, key)
        assert status == 500
        monkeypatch.undo()
        assert post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2}, key)[0] == 200  # it goes on
    for text in (caplog.text, json.dumps([answer, other])):
        for word in ("unicorn", "s3cret", "/home"):
            assert word not in text
    assert "unexpected RuntimeError in tests.serve.test_limits.broken" in caplog.text
    assert IMAGES + " 500" in caplog.text


def test_metrics(running: Running) -> None:
    post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2, "n": 3})
    text = get(running.url + "/metrics")[1].decode()
    for name in (
        'scale_rae_requests_total{route="/v1/images/generations",status="200"}',
        'scale_rae_request_seconds_bucket{le="1.0",route="/v1/images/generations"}',
        "scale_rae_requests_waiting 0.0",
        "scale_rae_requests_running 0.0",
        'scale_rae_batch_size_bucket{le="4.0",stage="draw"}',
        'scale_rae_stage_seconds_count{stage="sample"}',
        "scale_rae_images_total",
        "scale_rae_images_per_second",
    ):
        assert name in text, name


# --- the engine without HTTP ---------------------------------------------------------------------------------------


@pytest.fixture
def engine(shapes: ScaleRAE) -> Iterator[Engine]:
    engine = Engine(lambda: (shapes, {}))
    engine.start()
    assert engine.loaded.wait(HANGS)
    yield engine
    engine.close()


def job(prompt: str, seed: int, inbox: list[Any], **options: Any) -> Job:
    values = {"deadline": time.monotonic() + 600, **options}
    return Job([Turn("user", prompt)], None, SamplingOptions(steps=2), seed, inbox.append, **values)


def outcomes(inbox: list[Any], count: int) -> list[Any]:
    end = time.monotonic() + HANGS
    while sum(not isinstance(e, str) for e in inbox) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
    return [e for e in inbox if not isinstance(e, str)]


def test_one_that_fails_does_not_take_its_neighbours_along(
    engine: Engine, shapes: ScaleRAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = shapes.sample

    def fails_for_13(conditions: Any, seeds: Any, *rest: Any) -> Any:
        if 13 in seeds:
            raise RuntimeError("unlucky")
        return sample(conditions, seeds, *rest)

    monkeypatch.setattr(shapes, "sample", fails_for_13)
    inboxes: dict[int, list[Any]] = {seed: [] for seed in (11, 12, 13, 14)}
    engine.submit(*(job(CIRCLE, seed, inbox) for seed, inbox in inboxes.items()))  # they come together
    results = {seed: outcomes(inbox, 1)[0] for seed, inbox in inboxes.items()}
    assert isinstance(results.pop(13), RuntimeError)
    assert all(isinstance(result, Result) and len(result.images) == 1 for result in results.values())
    assert engine.idle


def test_pictures_of_one_request_are_drawn_as_those_of_several(engine: Engine, batches: list[tuple[int, int]]) -> None:
    """So that what was compiled in advance, and on a CPU tried for its last digits, serves every batch."""
    engine.warm()
    assert {images for _, images in batches} == set(engine.sizes.all)
    inbox: list[Any] = []
    engine.submit(job(CIRCLE, 0, inbox, count=4, best_of=4))
    assert isinstance(outcomes(inbox, 1)[0], Result)
    assert all(conditions == images for conditions, images in batches)


def test_pictures_too_many_to_encode_at_once_are_encoded_apart(
    engine: Engine, shapes: ScaleRAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = shapes.encode_pixels

    def limited(pixels: torch.Tensor) -> list[torch.Tensor]:
        if len(pixels) > 1:
            raise DeviceError("out of GPU memory")
        return encode(pixels)

    monkeypatch.setattr(shapes, "encode_pixels", limited)
    pixels = shapes.encoder.preprocess([Image.new("RGB", (128, 128), "white")])
    inboxes: list[list[Any]] = [[], []]
    deadline = time.monotonic() + 600
    asked = [Turn("user", "Describe this image.", 1)]
    jobs = [Job(asked, pixels, SamplingOptions(steps=2), 0, inbox.append, deadline, draws=False) for inbox in inboxes]
    engine.submit(*jobs)
    assert all(isinstance(outcomes(inbox, 1)[0], Result) for inbox in inboxes)


def test_every_job_has_one_outcome_also_at_the_end(shapes: ScaleRAE) -> None:
    engine = Engine(lambda: (shapes, {}))
    engine.start()
    assert engine.loaded.wait(HANGS)
    inbox: list[Any] = []
    jobs = [job(CIRCLE, i, inbox, best_of=4, count=4) for i in range(6)]
    for one in jobs:
        engine.submit(one)
    engine.cancel(jobs[3])
    engine.close()
    ended = outcomes(inbox, 5)
    assert len(ended) == 5
    assert all(isinstance(e, Refused | Result) for e in ended)
    with pytest.raises(Refused):
        engine.submit(job(CIRCLE, 0, inbox))


def test_a_cpu_whose_sums_depend_on_the_batch_draws_one_by_one(
    shapes: ScaleRAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = shapes.sample

    def rounds(conditions: Any, seeds: Any, options: Any = None, batch_size: Any = None, callback: Any = None) -> Any:
        return [x + 1e-6 * (batch_size == 3) for x in sample(conditions, seeds, options, batch_size, callback)]

    monkeypatch.setattr(shapes, "sample", rounds)
    engine = Engine(lambda: (shapes, {}))
    engine.start()
    assert engine.loaded.wait(HANGS)
    assert engine.batch_size == 2
    engine.close()


@pytest.mark.parametrize(
    ("waiting", "size"),
    [(1, 1), (2, 2), (3, 3), (5, 4), (6, 6), (7, 7), (9, 8), (17, 16), (23, 16), (24, 24), (40, 32)],
)
def test_batches_on_a_gpu_have_few_sizes(waiting: int, size: int) -> None:
    sizes = BatchSizes(32)
    assert sizes.images(waiting) == size
    assert sizes.padded(size) - size <= size / 3
