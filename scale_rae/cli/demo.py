"""scale-rae demo: a page to draw with, in the browser."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from scale_rae.cli import options as o
from scale_rae.cli.progress import Bars
from scale_rae.errors import need
from scale_rae.serve.settings import LOOPBACK

PAGE = "Page"


def command(
    model_path: o.ModelPath = "shapes",
    decoder_repo: o.DecoderRepo = None,
    revision: o.Revision = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    compile: o.Compile = "auto",
    quantize: o.Quantize = None,
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
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.", rich_help_panel=PAGE)
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is drawn in this folder. Default: a temporary one, gone when the page ends.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    debug: o.Debug = False,
) -> None:
    """Show a page to draw with: prompts, questions, best of N, latents.

    For one person or a few: visitors take turns. Nothing on it is fetched from or told to another machine.
    """
    need("demo", "scale-rae demo", "gradio")
    from scale_rae.outputs import check_folder
    from scale_rae.session import Session

    if output_dir is not None:
        check_folder(output_dir)
    bars = Bars()
    choice = o.ModelChoice(model_path, decoder_repo, revision, device, dtype, compile, quantize)
    with tempfile.TemporaryDirectory(prefix="scale-rae-demo-", ignore_cleanup_errors=True) as temporary:
        with bars.waiting("starting"):
            from scale_rae.demo import page
            from scale_rae.demo.work import Studio
        session = Session(choice, bars, decoder=True, debug=debug)
        folder = output_dir or Path(temporary) / "drawn"
        folder.mkdir(parents=True, exist_ok=True)
        built = page.build(Studio(session, choice, folder), Path(temporary) / "page")
        url = page.launch(built, host, port, [folder, Path(temporary)], browser=open_browser)
        if host not in LOOPBACK:
            typer.echo(f"note: anyone who can reach {host} can use the model; the page has no password", err=True)
        typer.echo(f"{url.rstrip('/')}  (Ctrl-C ends it)")
        page.wait(built)
