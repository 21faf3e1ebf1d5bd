"""The command `scale-rae demo`: a page in the browser."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from scale_rae.cli.options import Debug
from scale_rae.cli.progress import Bars
from scale_rae.cli.signature import expanded
from scale_rae.errors import need
from scale_rae.options import OUTPUT, ModelChoice
from scale_rae.serve.settings import LOOPBACK

PAGE = "Page"
_BUNDLED = ModelChoice("shapes")


@expanded
def command(
    *,
    choice: ModelChoice = _BUNDLED,
    host: Annotated[
        str,
        typer.Option(help="Address to show the page at; 0.0.0.0 is every one of this machine.", rich_help_panel=PAGE),
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, show_default="the first free one from 7860 on", help="Port.", rich_help_panel=PAGE
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another name that the page answers to, such as a reverse proxy's; may be repeated.",
            rich_help_panel=PAGE,
        ),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.", rich_help_panel=PAGE)
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is drawn in this folder. Default: a temporary one, gone when the page ends.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show a page to draw with: prompts, questions, best of N, latents.

    For one person or a few: visitors take turns. Nothing on it is fetched from or told to another machine.
    """
    need("demo", "scale-rae demo", "gradio")
    from scale_rae.demo.listening import bind
    from scale_rae.opening import OpenedModel, find_model
    from scale_rae.outputs import check_folder

    if output_dir is not None:
        check_folder(output_dir)
    source = find_model(choice)
    listener = bind(host, port)
    bars = Bars()
    with (
        _signals() as ending,
        tempfile.TemporaryDirectory(prefix="scale-rae-demo-", ignore_cleanup_errors=True) as temporary,
        contextlib.ExitStack() as closing,
    ):
        closing.enter_context(contextlib.closing(listener))
        closing.callback(ending.set)  # the first step of the end, whatever causes it
        folder, shown = output_dir or Path(temporary) / "drawn", Path(temporary) / "page"
        for each in (folder, shown):
            each.mkdir(parents=True, exist_ok=True)
        with bars.waiting("starting"):
            from scale_rae.demo.surroundings import settle

            settle(shown)
            from scale_rae.demo import page, server
            from scale_rae.demo.shared_model import SharedModel
        session = OpenedModel(choice, bars, decoder=True, debug=debug, source=source)
        model = SharedModel(session, choice, folder, shown / "drawn")
        running = server.launch(page.build(model, shown), listener, shown, allow_host or (), open_browser)
        if host not in LOOPBACK:
            typer.echo(f"note: anyone who can reach {host} can use the model; the page has no password", err=True)
        typer.echo(f"{running.url.rstrip('/')}  (Ctrl-C ends it)")
        try:
            while True:
                ending.wait(0.5)  # on some systems Ctrl-C does not interrupt a wait without a limit
        except KeyboardInterrupt:
            pass
        finally:
            ending.set()
            running.close()
            model.close()


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """A context in which SIGTERM interrupts as Ctrl-C does, until its event is set: then both are ignored, and the page closes in order."""
    ending = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        if not ending.is_set():
            raise KeyboardInterrupt

    before = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ending
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
