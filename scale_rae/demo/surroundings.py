"""Sets the environment variables that gradio sees to this page's. `settle` runs before gradio is imported."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read by the HTTP clients that gradio makes while it is imported. The page sends no requests.
_CLIENTS = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
_ours = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}


def settle(folder: Path | None = None) -> None:
    """Removes gradio's variables from the environment, and makes gradio keep its files in `folder`.

    `scale-rae demo` has options of its own; gradio's variables could make the page public, make it serve more folders, or
    keep it from starting. The default is a private temporary folder: gradio's own may belong to another user.
    """
    if folder is None and "GRADIO_TEMP_DIR" not in _ours:
        folder = _private()
    if folder is not None:
        _ours["GRADIO_TEMP_DIR"] = str(folder)
        # By default a folder below the working folder, which gradio serves too.
        _ours["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")
    for name in [name for name in os.environ if name.upper().startswith("GRADIO_")]:
        del os.environ[name]
    os.environ.update(_ours)


@functools.cache
def _private() -> Path:
    folder = tempfile.mkdtemp(prefix="scale-rae-demo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def without_clients() -> Iterator[None]:
    """A block without variables that can make the import of gradio fail: unusable proxies, missing certificates."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.upper() in _CLIENTS}
    try:
        yield
    finally:
        os.environ.update(hidden)
