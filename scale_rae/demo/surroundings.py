"""What gradio gets to see of the environment: nothing that is meant for other pages. `settle` runs before gradio is imported."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read by the HTTP clients that gradio makes while it is imported. The page asks nobody for anything.
_CLIENTS = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
_ours = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}


def settle(folder: Path | None = None) -> None:
    """Removes gradio's variables from the environment, and has gradio keep its files in `folder`.

    A page of `scale-rae demo` has its own options; gradio's variables could make it public, give out folders, or keep it from
    starting. By default the folder is a private temporary one: gradio's own, `/tmp/gradio`, may belong to another user.
    """
    if folder is None and "GRADIO_TEMP_DIR" not in _ours:
        folder = _private()
    if folder is not None:
        _ours["GRADIO_TEMP_DIR"] = str(folder)
        _ours["GRADIO_EXAMPLES_CACHE"] = str(
            folder / "examples"
        )  # else a folder below the working folder, given out too
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
    """While gradio is imported: proxies that its HTTP clients cannot use, and certificates that are not there, end the import."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.upper() in _CLIENTS}
    try:
        yield
    finally:
        os.environ.update(hidden)
