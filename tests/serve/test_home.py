"""The page at /, links to pictures, and the forms of pictures."""

from __future__ import annotations

import ast
import io
import json
import re
import urllib.error
import urllib.request
from base64 import b64decode
from html import unescape
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from scale_rae.serve.links import Links
from scale_rae.serve.settings import Limits
from tests.helpers.browser import DESKTOP, PHONE, chromium, needs_chromium
from tests.serve.conftest import CIRCLE, Running, Serve, openai

STEPS: dict[str, Any] = {"steps": 2, "seed": 3}


def fetch(url: str) -> tuple[int, str, bytes]:
    """The status, media type and body of what is at `url`."""
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status, answer.headers["content-type"], answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.headers["content-type"], e.read()


def test_the_examples_of_the_page_work(running: Running, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    status, kind, body = fetch(running.url)
    assert (status, kind.partition(";")[0]) == (200, "text/html")
    curl, python = (unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", body.decode(), re.S))
    asked = json.loads(curl.partition("-d '")[2].rstrip("'")) | STEPS
    address, kind = re.findall(r"http\S+", curl)[0], re.findall(r"\"Content-Type: (.*?)\"", curl)[0]
    request = urllib.request.Request(address, json.dumps(asked).encode(), {"Content-Type": kind})
    with urllib.request.urlopen(request) as answer:
        link = json.load(answer)["data"][0]["url"]
    assert Image.open(io.BytesIO(fetch(link)[2])).size == (128, 128)
    ast.parse(python)
    python = python.replace("circle.png", str(tmp_path / "circle.png"))
    exec(python, {})
    assert capsys.readouterr().out.strip()
    assert Image.open(tmp_path / "circle.png").format == "PNG"


@needs_chromium
def test_the_page_fits_a_phone(running: Running) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with chromium(sync_api) as browser:
        for size in (DESKTOP, PHONE):
            page = browser.new_page(viewport=size)
            page.goto(running.url)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            route = page.locator("td").first
            assert route.evaluate("e => getComputedStyle(e).textAlign") == "left"


def test_monitors_may_ask_for_the_head_of_the_page(running: Running) -> None:
    with urllib.request.urlopen(urllib.request.Request(running.url, method="HEAD")) as answer:
        assert answer.status == 200


def test_with_a_key_the_page_and_linked_pictures_stay_open(serve: Serve) -> None:
    with serve(api_key="secret") as running:
        page = fetch(running.url)[2].decode()
        assert "Bearer $SCALE_RAE_API_KEY" in page
        assert "secret" not in page
        assert fetch(f"{running.url}/v1/models")[0] == 401
        answer = running.client("secret").images.generate(prompt=CIRCLE, response_format="url", extra_body=STEPS)
        assert answer.data is not None
        status, kind, body = fetch(answer.data[0].url or "")
        assert (status, kind) == (200, "image/png")
        again = running.client("secret").images.generate(prompt=CIRCLE, extra_body=STEPS)
        assert body == b64decode((again.data or [])[0].b64_json or "")
        assert fetch(f"{running.url}/v1/images/files/guessed.png")[0] == 404


def test_pictures_come_in_the_format_that_is_asked_for(running: Running) -> None:
    files = {}
    for form, quality in (("png", None), ("webp", None), ("jpeg", 50)):
        more = {} if quality is None else {"output_compression": quality}
        answer = running.client().images.generate(prompt=CIRCLE, output_format=form, **more, extra_body=STEPS)
        assert answer.output_format == form
        files[form] = b64decode(answer.data[0].b64_json)
        assert Image.open(io.BytesIO(files[form])).format == form.upper()
    pixels = [np.asarray(Image.open(io.BytesIO(files[form])).convert("RGB")) for form in ("png", "webp", "jpeg")]
    assert np.array_equal(pixels[0], pixels[1])
    assert np.abs(pixels[0].astype(int) - pixels[2]).max() > 0
    said = json.loads(Image.open(io.BytesIO(files["jpeg"])).getexif()[ExifTags.Base.ImageDescription])
    assert said["image_seed"] == "3"
    with pytest.raises(openai.BadRequestError, match="output_compression: PNG is lossless"):
        running.client().images.generate(prompt=CIRCLE, output_compression=50)


def test_docs_are_there_only_if_asked_for(running: Running, serve: Serve) -> None:
    assert fetch(f"{running.url}/docs")[0] == 404
    with serve(docs=True, api_key="secret") as with_docs:  # a browser sends no key for a page
        assert fetch(f"{with_docs.url}/openapi.json")[0] == 200
        assert fetch(f"{with_docs.url}/docs")[:2] == (200, "text/html; charset=utf-8")
        assert 'href="docs"' in fetch(with_docs.url)[2].decode()


def test_pictures_expire_and_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("scale_rae.serve.links.time.monotonic", lambda: now)
    links = Links(10, most=250)
    first, second = (links.add(bytes(100), "png") for _ in range(2))
    assert links.get(first) is not None
    third = links.add(bytes(100), "webp")
    assert [links.get(name) is not None for name in (first, second, third)] == [False, True, True]
    now = 10.0
    assert links.get(second) is links.get(third) is None
    assert Limits().linked == 3600
