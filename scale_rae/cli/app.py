"""The table of commands, and what every command does with errors.

A new command is a file here with a function `command` (typer options, a docstring), and a line in COMMANDS.
"""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from scale_rae import __version__
from scale_rae.errors import OptionError, ScaleRAEError, first_line, printable

# name -> (module, what `scale-rae --help` says of it); the module is imported when its command is run
COMMANDS = {
    "t2i": ("scale_rae.cli.t2i", "Draw images from a prompt, or from every prompt of a file."),
    "img": ("scale_rae.cli.img", "Ask about an image, or have it changed."),
    "latent": ("scale_rae.cli.latent", "Decode saved latents, ask about them, or continue from them."),
    "scale": ("scale_rae.cli.scale", "Draw many images of each prompt, and judge and rank them (test-time scaling)."),
    "select": ("scale_rae.cli.select", "Keep the best images of each prompt of an experiment."),
    "report": ("scale_rae.cli.report", "Make a web page of an experiment: images, scores, plots."),
    "serve": ("scale_rae.cli.serve", "Serve a model to OpenAI's clients over HTTP."),
    "sheet": ("scale_rae.cli.sheet", "Make a contact sheet of an experiment: one picture of its images."),
    "demo": ("scale_rae.cli.demo", "Show a page to draw with, in the browser."),
}


class _LazyGroup(TyperGroup):
    """Lists every command without importing it; imports the one that is run."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        return name, _load(name), rest


def _load(name: str) -> Any:
    function = importlib.import_module(COMMANDS[name][0]).command
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(_guarded(function))
    return typer.main.get_command(single)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"scale-rae {__version__}")
        raise typer.Exit


def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Scale-RAE: draw, look, and work on latents with one model."""


def run(argv: Sequence[str] | None = None) -> int:
    """Parses and runs; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a reply in any script, on a terminal of any encoding
            stream.reconfigure(errors="backslashreplace")
    app = typer.Typer(
        cls=_LazyGroup,
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        # The official flags are also known with underscores: --model_path is --model-path.
        context_settings={
            "token_normalize_func": lambda name: name.replace("_", "-"),
            "help_option_names": ["--help", "-h"],
        },
    )
    app.callback()(_group)
    program = Path(sys.argv[0]).name if argv is None else "scale-rae"
    try:
        typer.main.get_command(app).main(args=None if argv is None else list(argv), prog_name=program)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    return 0


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends the command with one line on stderr."""
    typer.echo("error: " + printable(" ".join(message.split("\n"))), err=True)
    raise typer.Exit(code)


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors turned into one line and an exit code; `debug=True` shows the traceback too."""

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> None:
        try:
            function(*args, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter, SystemExit):
            raise
        except KeyboardInterrupt:
            fail("interrupted; nothing is left half-written", 130)
        except BrokenPipeError:
            raise  # whoever read our output has gone; click ends quietly
        except Exception as e:
            if options.get("debug"):
                traceback.print_exc()
            if isinstance(e, ScaleRAEError):
                fail(str(e), 2 if isinstance(e, OptionError) else 1)
            fail(f"unexpected {type(e).__name__}: {first_line(e)} (run with --debug for the traceback)")

    return command
