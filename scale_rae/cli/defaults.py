"""Defaults of options from the environment and a configuration file: SCALE_RAE_STEPS=20, or `steps = 20` in config.toml.

A flag counts before a variable, a variable before the file, and in the file a command's table before the top:

    model-path = "shapes"  # of every command that has the option

    [t2i]
    guidance-level = 2
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from scale_rae.cli.signature import Spellings
from scale_rae.errors import printable

PREFIX = "SCALE_RAE_"
CONFIG = f"{PREFIX}CONFIG"  # names another configuration file; empty: none is read
_NOT_FROM_HERE = ("help", "version")
_KUBERNETES = re.compile(r"\w+://")  # it sets SCALE_RAE_PORT=tcp://… beside a service of the name scale-rae
Default = tuple[Any, str]  # a value, and where it stands


def config_file() -> Path:
    """Where the configuration file is looked for if no variable names it: in the user's folder for such files."""
    return Path(typer.get_app_dir("scale-rae")) / "config.toml"


def defaults(
    command: Any, ctx: Any, commands: Collection[str], known: Callable[[], Mapping[str, set[str]]]
) -> dict[str, Any]:
    """The values of a command's options that its click context is to have in `default_map`.

    `commands` are the names of all commands. `known()` has the names of the options of each; since it imports all commands, it
    is called only if a key of the file is no option of this command.

    Raises:
        typer.BadParameter: naming file and key, or the variable, for what is no option, or no value that the option takes.
    """
    file, content = _content(ctx)
    names = _names(ctx)
    tops = {key: value for key, value in content.items() if not isinstance(value, dict)}
    given: dict[str, Default] = {}
    options = options_of(command)
    for table, where in ((tops, "top"), (_own_table(ctx, file, content, names, commands), "table")):
        for key, value in table.items():
            name = key.replace("-", "_")
            if isinstance(value, dict):
                continue
            if name in options:
                given[options[name].name] = value, f"{file}: {key}"
            elif where == "table" or not any(name in others for others in known().values()):
                whose = f"scale-rae {' '.join(names)}" if where == "table" else "any command"
                everything = {option for others in known().values() for option in others}
                raise _error(ctx, f"{file}: {key} is no option of {whose}{_similar(name, everything)}")
    for name, option in options.items():
        value = os.environ.get(PREFIX + name.upper())
        if value and not (name == "port" and _KUBERNETES.match(value)):
            many = option.nargs != 1 or option.multiple
            given[option.name] = value.split() if many else value, PREFIX + name.upper()
    return {name: _checked(value, where, options[name], ctx) for name, (value, where) in given.items()}


def _own_table(
    ctx: Any, file: Path, content: dict[str, Any], names: Sequence[str], commands: Collection[str]
) -> dict[str, Any]:
    """The table of the command in the file's content, after a check that no table on the way there names what is no command."""
    tables = [content]
    for name in names:
        inner = tables[-1].get(name, {})
        tables.append(inner if isinstance(inner, dict) else {})
    for top in (name for name, value in content.items() if isinstance(value, dict)):
        if top not in commands:
            raise _error(ctx, f"{file}: [{top}] is no command{_similar(top, commands)}")
    for depth, table in enumerate(tables[1:], start=1):
        inner = ctx.parent.command.commands if depth < len(names) else None  # of a command with commands of its own
        for key, value in table.items():
            path = ".".join([*names[:depth], key])
            if isinstance(value, dict) and (inner is None or key not in inner):
                raise _error(ctx, f"{file}: [{path}] is no command{_similar(key, inner or ())}")
            if inner is not None and not isinstance(value, dict):
                raise _error(ctx, f"{file}: {path}: put it into the table of one command, as [{names[0]}.{names[-1]}]")
    return tables[-1]


def options_of(command: Any) -> dict[str, Any]:
    """The options of a click command by all their long names, with underscores."""
    found: dict[str, Any] = {}
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name not in _NOT_FROM_HERE:
            found |= {o[2:].replace("-", "_"): parameter for o in parameter.opts if o.startswith("--")}
    for alias, flag in getattr(command, "spellings", Spellings()).aliases.items():
        found[alias.replace("-", "_")] = found[flag.replace("-", "_")]
    return found


def _names(ctx: Any) -> list[str]:
    """The names by which the command is called: ["evaluate", "geneval"]."""
    return [] if ctx.parent is None else [*_names(ctx.parent), ctx.info_name]


def _content(ctx: Any) -> tuple[Path, dict[str, Any]]:
    """The configuration file and what is in it, nothing if there is none."""
    named = os.environ.get(CONFIG)
    file = config_file() if named is None else Path(named)
    if named == "" or (named is None and not file.is_file()):
        return file, {}
    try:
        return file, tomllib.loads(file.read_bytes().decode())
    except OSError as e:
        raise _error(ctx, f"{file}: the configuration cannot be read ({e.strerror or e})") from e
    except ValueError as e:  # not UTF-8, or not TOML
        raise _error(ctx, f"{file}: the configuration is not valid TOML ({e})") from e


def _checked(value: Any, where: str, option: Any, ctx: Any) -> Any:
    """The value, after click has made the option's type of it."""
    if option.multiple and not isinstance(value, list):
        value = [value]
    try:
        if isinstance(value, list) and option.nargs == 1 and not option.multiple:
            raise typer.BadParameter("takes one value")
        option.process_value(ctx, value)
    except typer.BadParameter as e:
        raise _error(ctx, f"{where}: {e.message}") from e
    return value


def _error(ctx: Any, message: str) -> typer.BadParameter:
    """The error with a text from a file or a variable in it, whose control characters are escaped."""
    return typer.BadParameter(printable(message), ctx=ctx)


def _similar(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0].replace('_', '-')}?" if near else ""
