"""Fuzzed from its own OpenAPI document: whatever comes, no 5xx, and what goes out is as the document says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from scale_rae.pipeline import ScaleRAE
from scale_rae.serve.settings import Limits
from tests.serve.conftest import serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def document(checkpoints: dict[str, Path]) -> Iterator[Any]:
    model = ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cpu")  # small, and so fast
    limits = Limits(steps=8, drawings=4, new_tokens=16, body=100_000)
    with serving(model, limits=limits) as running:
        yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")


api = schemathesis.pytest.from_fixture("document")


@api.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_5xx(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, timeout=30)
