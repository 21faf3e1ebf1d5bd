"""`scale-rae demo` before there is a page. The page's own tests are in tests/demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


def test_without_gradio_the_extra_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    run = cli("demo")
    assert run.code == 1
    assert run.error == 'scale-rae demo: needs gradio, which is not installed; pip install "scale-rae[demo]"'


def test_help_loads_neither_gradio_nor_torch() -> None:
    code = (
        "import sys, scale_rae; from scale_rae.cli import main; main(['--help']); main(['demo', '--help']);"
        "print(sorted({'gradio', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "Show a page to draw with" in result.stdout


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    taken = tmp_path / "file"
    taken.write_text("")
    run = cli("demo", "--output-dir", taken)
    assert run.code == 1
    assert "cannot be an output folder" in run.error


def test_an_unknown_model_is_one_line(cli: Cli) -> None:
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    run = cli("demo", "--model-path", "no such model")
    assert run.code == 1
    assert run.error.startswith("no such model: no such model folder")
