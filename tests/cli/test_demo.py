"""`scale-rae demo` where its extra is not installed. The page itself has no tests yet."""

from __future__ import annotations

import sys

import pytest

from tests.cli.conftest import Cli


def test_without_gradio_the_extra_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    run = cli("demo")
    assert run.code == 1
    assert "scale-rae[demo]" in run.err
