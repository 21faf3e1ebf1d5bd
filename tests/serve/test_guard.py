"""Who may ask, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from scale_rae.serve.guard import known_host


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("LocalHost:8000", True),
        ("127.0.0.1:1", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("::1", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("localhost:80.evil.example", False),
        ("localhost@evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("", False),
    ],
)
def test_only_names_of_this_machine_are_known_hosts(host: str, known: bool) -> None:
    scope: Any = {"type": "http", "headers": [(b"host", host.encode())]}
    assert known_host(scope) is known


def test_one_of_two_hosts_is_foreign() -> None:
    assert not known_host({"type": "http", "headers": [(b"host", b"localhost"), (b"host", b"evil.example")]})
