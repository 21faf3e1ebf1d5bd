"""The command `scale-rae serve`: a server with OpenAI's interfaces."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from scale_rae.cli.options import Debug
from scale_rae.cli.progress import Bars
from scale_rae.cli.signature import expanded
from scale_rae.errors import InputError, need
from scale_rae.options import PROMPT_PREFIX, REWARDS, ModelChoice
from scale_rae.serve.settings import API_KEY_VARIABLE as KEY_VARIABLE
from scale_rae.serve.settings import LOOPBACK, Limits, ServeSettings

# The command reads the environment variable itself: typer would show its value in --help.
SERVER = "Server"


@expanded
def command(
    *,
    choice: ModelChoice,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but this machine's own wants a key.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0 takes one that is free.", rich_help_panel=SERVER)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"What clients must send as Authorization: Bearer KEY. Better in the environment variable {KEY_VARIABLE}, "
            "since other users can read command lines.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Serve other machines without a key.", rich_help_panel=SERVER)
    ] = False,
    model_name: Annotated[
        str | None,
        typer.Option(
            help="The model's name in requests. Default: the last part of --model-path.", rich_help_panel=SERVER
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Load this reward for best_of: imagereward, siglip or pickscore; may be given several times.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    reward_path: Annotated[
        str | None, typer.Option(help="Folder with the reward's weights, instead of the hub.", rich_help_panel=SERVER)
    ] = None,
    prompt_prefix: Annotated[
        str,
        typer.Option(
            help="Put before each prompt of /v1/images/generations that is not a request already.",
            rich_help_panel=SERVER,
        ),
    ] = PROMPT_PREFIX,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most images drawn at once. Default: 4 a core on the CPU, 32 elsewhere.", rich_help_panel=SERVER
        ),
    ] = None,
    warm_up: Annotated[
        bool | None,
        typer.Option(
            "--warm-up/--no-warm-up",
            help="Compile for every batch size before the first request. Default: on CUDA.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None,
    docs: Annotated[
        bool,
        typer.Option(
            "--docs",
            help="Serve /docs, a page to try the routes. The reader's browser loads the page's scripts from elsewhere.",
            rich_help_panel=SERVER,
        ),
    ] = False,
    limits: Limits,
    debug: Debug = False,
) -> None:
    """Serve a model to OpenAI's clients: images/generations and chat/completions, with what waits drawn together.

    SIGTERM or Ctrl-C finishes what runs and refuses the rest; a second one refuses that too.
    """
    need("serve", "scale-rae serve", "fastapi", "uvicorn", "prometheus_client")
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and (not key.strip() or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise InputError("the API key must be printable ASCII without spaces around it, and not empty")
    if key is None and host not in LOOPBACK and not no_api_key:
        raise InputError(
            f"--host {host} lets other machines in: give {KEY_VARIABLE} or --api-key, or say that you mean it by --no-api-key"
        )
    for name in reward or ():
        if name not in REWARDS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(REWARDS)}", param_hint=["--reward"])
    bars = Bars()
    with bars.waiting("starting"):
        from scale_rae.serve.server import serve

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("scale_rae").setLevel(logging.INFO)
    settings = ServeSettings(
        choice,
        host,
        port,
        key,
        model_name or Path(choice.model_path).name or "scale-rae",
        tuple(dict.fromkeys(reward or ())),
        reward_path,
        prompt_prefix,
        batch_size,
        warm_up,
        debug,
        docs,
        limits,
    )
    serve(settings, bars, lambda text: typer.echo(text, err=True))
