"""Fuzzed from its own OpenAPI document: whatever comes, no 5xx, and what goes out is as the document says."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from scale_rae.pipeline import ScaleRAE
from scale_rae.serve.schema import PIXEL
from scale_rae.serve.settings import Limits
from tests.serve.conftest import serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


DRAWN = "Can you generate a photo of a cat on a windowsill?"
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1/images/files/{name}"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
]


@pytest.fixture(scope="module")
def document(checkpoints: dict[str, Path]) -> Iterator[Any]:
    model = ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cpu")  # small, and so fast
    limits = Limits(steps=4, drawings=4, new_tokens=8, body=100_000)
    with serving(model, limits=limits) as running:
        yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")


def test_the_document_has_these_operations(document: Any) -> None:
    described = {(op.ok().method.upper(), op.ok().path) for op in document.get_all_operations()}
    assert described == set(OPERATIONS)


def mend(body: Any) -> None:
    """Replaces what no schema can say: what the model and machine draw, that the last word is a user's, that lo is below hi."""
    if body.get("guidance_interval") is not None:
        body["guidance_interval"] = [0.25, 0.75]
    body.pop("noise", None)  # there may be no GPU
    if "prompt" in body:
        body["prompt"] = DRAWN
        body.pop("reward", None)
        body["size"] = "auto"
        if body.get("best_of") not in (None, "auto"):
            body["best_of"] = 4
        if body["prompt"] and (body.get("n") or 1) > 2:
            body["n"] = 2
        return
    if "input" in body:
        if isinstance(body["input"], list):
            for item in body["input"]:
                if "result" in item:
                    item["result"] = PIXEL.partition(",")[2]
                for part in item["content"] if isinstance(item.get("content"), list) else ():
                    if "image_url" in part:
                        part["image_url"] = PIXEL
            body["input"] = [*body["input"][:3], {"role": "user", "content": DRAWN}]
        else:
            body["input"] = DRAWN
        return
    for message in body["messages"]:
        parts = (message.get("images") or []) + (message["content"] if isinstance(message.get("content"), list) else [])
        for part in parts:
            if "image_url" in part:
                part["image_url"]["url"] = PIXEL
    body["messages"] = [*body["messages"][:3], {"role": "user", "content": DRAWN}]


def asked(document: Any) -> dict[str, float]:
    """Answers so far by status, of the routes that reach the model."""
    with urllib.request.urlopen(document.location.replace("openapi.json", "metrics")) as answer:
        text = answer.read().decode()
    counts: dict[str, float] = {}
    for status, count in re.findall(r'requests_total\{route="/v1/[icr].*status="(\d+)"\} (\S+)', text):
        counts[status] = counts.get(status, 0) + float(count)
    return counts


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_5xx(document: Any, method: str, path: str, mode: GenerationMode) -> None:
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("takes nothing that could be wrong")

    before = asked(document)

    @given(operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=40
        if method == "POST"
        else 10,  # what they are depends on the constants of all modules loaded so far
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def whatever_comes(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and method == "POST":
            mend(case.body)
        case.call_and_validate(checks=CHECKS, timeout=300)

    whatever_comes()
    statuses = {status: count - before.get(status, 0) for status, count in asked(document).items()}
    if method == "POST" and mode is GenerationMode.POSITIVE:
        assert statuses["200"] >= 10, statuses  # else all of this stays in front of the model
    elif method == "POST":
        assert statuses["400"] >= 20, statuses
