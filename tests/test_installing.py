"""Installing from a checkout where Python does not fit."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_make = pytest.mark.skipif(sys.platform == "win32" or shutil.which("make") is None, reason="needs make and sh")


def _python(file: Path, commands: str) -> Path:
    """A shell script that stands for Python: it runs `commands`, with the real one as $REAL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/bin/sh\nREAL="{sys.executable}"\n{commands}\n')
    file.chmod(0o755)
    return file


@needs_make
@pytest.mark.parametrize("existing", [False, True], ids=["python3", "environment"])
def test_make_refuses_a_python_that_is_too_old(tmp_path: Path, existing: bool) -> None:
    """Before it makes an environment of it, which would be used again once a newer Python is given."""
    old = _python(
        tmp_path / ("venv/bin/python" if existing else "old"),
        'if [ "$1" = -c ]; then exec "$REAL" -c "import sys; sys.version_info = (3, 10, 12); $2"; fi; touch "$0.called"; exit 1',
    )
    python = sys.executable if existing else old
    made = [f"VENV={tmp_path / 'venv'}", f"PYTHON={python}", f"{tmp_path / 'venv'}/.installed"]
    run = subprocess.run(["make", *made], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "is Python 3.10, but 3.11 or newer is needed; give another one: make demo PYTHON=" in run.stderr
    assert not old.with_suffix(".called").exists()
    assert existing == (tmp_path / "venv").exists()


@needs_make
def test_make_completes_an_environment_without_pip(tmp_path: Path) -> None:
    """Debian leaves one behind where its package python3-venv is missing."""
    inside = _python(tmp_path / "venv" / "bin" / "python", 'if [ "$1" = -c ]; then exec "$REAL" "$@"; fi; exit 1')
    outside = _python(tmp_path / "python3", f'echo "$@" > "{tmp_path / "asked"}"')
    made = [f"VENV={inside.parents[1]}", f"PYTHON={outside}", f"{inside.parents[1]}/.installed"]
    subprocess.run(["make", *made], cwd=ROOT, capture_output=True)
    assert (tmp_path / "asked").read_text().split() == ["-m", "venv", str(inside.parents[1])]


def test_setup_names_the_python_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip runs setup.py before it looks at requires-python."""
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(SystemExit, match=r"scale-rae needs Python 3\.11 or newer; this is Python \d"):
        runpy.run_path(str(ROOT / "setup.py"))
