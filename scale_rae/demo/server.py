"""Starts and stops the demo's HTTP server. (Gradio's own launch sends requests to itself, which a proxy can break.)"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from scale_rae.demo.event_streams import EventStreams
from scale_rae.demo.gate import Gate
from scale_rae.demo.limits import LARGEST_FILE
from scale_rae.demo.page import CSS, THEME
from scale_rae.errors import ScaleRAEError
from scale_rae.serve.connections import Connection
from scale_rae.serve.settings import Limits

LIMITS = Limits(deadline=120.0)  # of connections and heads, and for reading an answer; the gate has the rest


class _Server(uvicorn.Server):
    """Uvicorn on a thread of its own, for a socket that listens already."""

    def __init__(self, app: Any, listener: socket.socket) -> None:
        protocol: Any = functools.partial(Connection, LIMITS, lambda _why: None)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="critical",  # the gate logs the page's errors
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=2,
                h11_max_incomplete_event_size=LIMITS.head,
            )
        )
        self._listener = listener
        self._thread = threading.Thread(target=self._run_on_thread, name="page", daemon=True)
        self._thread.start()

    def _run_on_thread(self) -> None:
        with contextlib.closing(self._listener):
            self.run(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)  # about clients that left
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.sweep(time.monotonic())
        return await super().on_tick(counter)

    def wait_until_started(self) -> None:
        """Returns when requests are answered; raises ScaleRAEError when the server ends before."""
        while not self.started:
            self._thread.join(0.01)
            if not self._thread.is_alive():
                raise ScaleRAEError("the page's server ended while it started")

    def close(self) -> None:
        """Ends the server; called by `gr.Blocks.close`."""
        self.should_exit = True
        self._thread.join(timeout=5)


@dataclass(frozen=True)
class Running:
    """A page that is shown at `url`."""

    url: str
    page: Any  # gr.Blocks

    def close(self) -> None:
        """Ends the queue, the streams and the server."""
        self.page.close(verbose=False)


def launch(
    page: Any, listener: socket.socket, folder: Path, names: Sequence[str] = (), browser: bool = False
) -> Running:
    """Serves a page that `page.build` made for `folder`, and the files in `folder`, on a socket of `bind`.

    `names`: see `Gate`.

    Raises:
        ScaleRAEError: when the server does not start.
    """
    import gradio as gr  # after fence.py, which hides environment variables

    host, port = listener.getsockname()[:2]
    parent = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        parent,
        page,
        path="/",
        root_path="",
        footer_links=[],
        allowed_paths=[],
        show_error=False,
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=THEME,
        css=CSS,
    )
    page.app = parent.routes[-1].app  # type: ignore[attr-defined]  # for page.close
    page.has_launched = True  # otherwise gradio does not check the files that visitors name
    page.server = _Server(Gate(EventStreams(parent), folder, host, names), listener)
    page.server.wait_until_started()
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{port}/"
    if browser:
        webbrowser.open(url)
    return Running(url, page)
