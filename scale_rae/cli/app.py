"""The program `scale-rae`: the table of commands, printing, and errors as one line with an exit code.

To add a command, add a file here with a function `command` (typer options, a docstring), and a line in COMMANDS. A command with
subcommands has `commands` instead: functions by name.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from scale_rae.cli.defaults import defaults, options_of
from scale_rae.cli.signature import Spellings
from scale_rae.errors import (
    InputError,
    OptionError,
    OutputError,
    ScaleRAEError,
    first_line,
    missing_package,
    printable,
)
from scale_rae.files import check_name
from scale_rae.jsonio import dump_json
from scale_rae.version import __version__

_DRAW, _SCALE, _TRAIN = "Draw and ask", "Scale and measure", "Train"

# name -> (module, heading and line in `scale-rae --help`); the module is imported when its command is run
COMMANDS = {
    "t2i": ("scale_rae.cli.t2i", _DRAW, "Draw images from a prompt, or from every prompt of a file."),
    "img": ("scale_rae.cli.img", _DRAW, "Ask about an image, or have it changed."),
    "latent": ("scale_rae.cli.latent", _DRAW, "Decode saved latents, ask about them, or continue from them."),
    "demo": ("scale_rae.cli.demo", _DRAW, "Show a page to draw with, in the browser."),
    "serve": ("scale_rae.cli.serve", _DRAW, "Serve a model to OpenAI's clients over HTTP."),
    "inspect": ("scale_rae.cli.inspect", _DRAW, "Say what a model is and what it needs, before it is downloaded."),
    "scale": (
        "scale_rae.cli.scale",
        _SCALE,
        "Draw many images of each prompt, and judge and rank them (test-time scaling).",
    ),
    "score": ("scale_rae.cli.score", _SCALE, "Add a reward's scores to an experiment that was drawn without a reward."),
    "select": ("scale_rae.cli.select", _SCALE, "Keep the best images of each prompt of an experiment."),
    "report": ("scale_rae.cli.report", _SCALE, "Make a web page of an experiment: images, scores, plots."),
    "sheet": ("scale_rae.cli.sheet", _SCALE, "Make a contact sheet of an experiment: one picture of its images."),
    "evaluate": (
        "scale_rae.cli.evaluate",
        _SCALE,
        "Score images by GenEval's rules: do they show what their prompts name?",
    ),
    "reproduce": (
        "scale_rae.cli.reproduce",
        _SCALE,
        "Measure a model as the paper does: draw GenEval's prompts, choose, evaluate.",
    ),
    "train": ("scale_rae.cli.train", _TRAIN, "Fine-tune a model on pictures and texts: a LoRA, or all weights."),
    "distill": ("scale_rae.cli.distill", _TRAIN, "Distil a model: a student that draws in 1 to 8 evaluations."),
    "merge": ("scale_rae.cli.merge", _TRAIN, "Write a model with LoRA adapters merged in, as a checkpoint of its own."),
}


class _LazyGroup(TyperGroup):
    """Lists every command without importing it; imports the one that is run."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        _, heading, line = COMMANDS[cmd_name]
        return TyperCommand(cmd_name, help=line, rich_help_panel=heading)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        return name, load_command(name), rest


def _all_options() -> dict[str, set[str]]:
    """The names of the options of each command, those of subcommands included; imports every command."""
    found = {}
    for name in COMMANDS:
        command = load_command(name)
        found[name] = {o for c in (command, *getattr(command, "commands", {}).values()) for o in options_of(c)}
    return found


class _Command(TyperCommand):
    """A command that refuses an option of one value given twice; click would silently use the last one.

    Options that are not given take their defaults from the environment and the configuration file.
    """

    spellings = Spellings()

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        extra["token_normalize_func"] = self._spelling
        return super().make_context(info_name, args, parent, **extra)

    def _spelling(self, name: str) -> str:
        """The flag's own name, without dashes before it. The official flags are known with underscores, too."""
        name = name.replace("_", "-")
        return self.spellings.aliases.get(name, name)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        ctx.default_map = defaults(self, ctx, COMMANDS, _all_options)
        return super().parse_args(ctx, args)

    def make_parser(self, ctx: Any) -> Any:
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_once(args: list[str]) -> tuple[dict[str, Any], list[str], list[Any]]:
            values, rest, order = parse(_with_values(args, self.spellings))
            for option, count in Counter(order).items():
                harmless = option.is_flag and not option.secondary_opts if option.param_type_name == "option" else True
                if count > 1 and not option.multiple and not harmless:
                    raise typer.BadParameter(f"is given {count} times; it takes one value", ctx=ctx, param=option)
            return values, rest, order

        parser.parse_args = parse_once
        return parser


def load_command(name: str) -> Any:
    """The click command of that name, or its group of subcommands; imports its module."""
    module_name, _, help_line = COMMANDS[name]
    module = importlib.import_module(module_name)
    subcommands = getattr(module, "commands", None)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=subcommands is not None)
    functions = subcommands or {name: module.command}
    for inner, function in functions.items():
        app.command(inner, cls=_Command)(_guarded(function))
    if subcommands is not None:
        app.callback(help=help_line)(lambda: None)
    loaded: Any = typer.main.get_command(app)
    for inner, function in functions.items():
        command = loaded if subcommands is None else loaded.commands[inner]
        command.spellings = getattr(function, "spellings", Spellings())
    return loaded


def _with_values(args: Sequence[str], spellings: Spellings) -> list[str]:
    """The arguments, with the value of each flag that is given without any, and lists in one argument each.

    A list that ends with a comma goes on in the next argument, as in --seed 42, 123, 456.
    """
    complete: list[str] = []
    for i, arg in enumerate(args):
        if len(complete) > 1 and complete[-1].endswith(",") and complete[-2] in spellings.lists:
            complete[-1] += arg
            continue
        complete.append(arg)
        value = spellings.bare.get(arg.replace("_", "-"))
        if value is not None and (i + 1 == len(args) or args[i + 1].startswith("-")):
            complete.append(value)
    return complete


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"scale-rae {__version__}")
        raise typer.Exit


def _group(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Scale-RAE: draw, look, and work on latents with one model.

    To try it without a download: scale-rae t2i "Show me a red star." --model-path shapes

    What a command does, and its options: scale-rae t2i --help
    """


def run(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command line, after all output is written out."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a reply may be in any script
            stream.reconfigure(errors="backslashreplace")
    app = typer.Typer(
        cls=_LazyGroup,
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
    if program == "__main__.py":
        program = "python -m scale_rae"
    try:
        typer.main.get_command(app).main(args=None if argv is None else list(argv), prog_name=program)
    except SystemExit as e:
        return _written_out(e.code if isinstance(e.code, int) else 0 if e.code is None else 1)
    except OSError as e:  # from --help; commands report their own errors
        say(f"error: {_no_stdout(e)}")
        return _written_out(1)
    return _written_out(0)


def _written_out(code: int) -> int:
    """The exit code, after stdout is flushed. What cannot be written is dropped; else Python would complain at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as e:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not code and not isinstance(e, BrokenPipeError):
            say(f"error: {_no_stdout(e)}")
        return code or 1
    return code


def _no_stdout(error: OSError) -> str:
    return f"the standard output cannot be written ({error.strerror or error}); send it elsewhere"


def say(text: str) -> None:
    """Prints one line on stderr; control characters, which files and models may hold, are escaped."""
    with contextlib.suppress(OSError):  # there is nowhere to report a closed stderr
        typer.echo(printable(" ".join(text.split("\n"))), err=True)


def show(text: str) -> None:
    """Prints text, of one line or several, on stdout; control characters are escaped.

    Raises:
        OutputError: when it cannot be written.
    """
    _print(printable(text, lines=True))


def show_json(value: Any) -> None:
    """Prints a value as one line of JSON: in UTF-8 if stdout is UTF-8, else in ASCII with escapes.

    Raises:
        OutputError: when it cannot be written.
    """
    try:
        ascii_only = codecs.lookup(sys.stdout.encoding).name != "utf-8"
    except (LookupError, TypeError):
        ascii_only = True
    # In JSON, control characters occur only inside texts, where an escape means the same.
    _print(printable(dump_json(value, ascii_only=ascii_only), escape=lambda character: f"\\u{ord(character):04x}"))


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """The rows as lines with aligned columns; those in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _print(text: str) -> None:
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise OutputError(_no_stdout(e)) from e


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends the command with one line on stderr."""
    say(f"error: {message}")
    raise typer.Exit(code)


def _check_texts(options: dict[str, Any]) -> None:
    """Raises InputError for a value that is not Unicode text, since no manifest could record it.

    Python turns bytes of arguments that are not valid UTF-8 into lone surrogates.
    """
    for name, value in options.items():
        what = name.replace("_", " ")
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Path):
                check_name(item, what)
            elif isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as e:
                    raise InputError(
                        f"{what} {item!a:.80}: not valid Unicode text (it is not UTF-8), so it cannot be recorded"
                    ) from e


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    """The command with errors as one line and an exit code; `debug=True` adds the traceback."""

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> None:
        try:
            _check_texts(options)
            function(*args, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter, SystemExit):
            raise
        except KeyboardInterrupt:
            fail("interrupted; nothing is left half-written", 130)
        except BrokenPipeError:
            raise  # the reader of our output has gone; click ends quietly
        except Exception as e:
            if options.get("debug"):
                typer.echo(printable(traceback.format_exc(), lines=True), err=True, nl=False)
            if isinstance(e, ScaleRAEError):
                fail(str(e), 2 if isinstance(e, OptionError) else 1)
            if isinstance(e, ModuleNotFoundError):
                fail(missing_package(e))
            fail(f"unexpected {type(e).__name__}: {first_line(e)} (run with --debug for the traceback)")

    return command
