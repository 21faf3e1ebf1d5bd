"""Expands options dataclasses into command-line flags; a new option needs no edit here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import MISSING, is_dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer

from scale_rae.options import Knob, Option, knob_of, options_of, with_values


def one_of(*values: str) -> Callable[[str | None], str | None]:
    """A check, for typer, that an option is one of `values`."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in values:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(values)}")
        return value

    return check


def flag_name(name: str) -> str:
    """The flag of an option: --num-images for num_images."""
    return f"--{name.replace('_', '-')}"


def given_options(ctx: typer.Context) -> set[str]:
    """The names of the options that were given on the command line, also of those that have their default's value."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source and source.name not in ("DEFAULT", "DEFAULT_MAP")}


class Spellings(NamedTuple):
    """How the flags of a command may be written, beyond what typer knows."""

    bare: Mapping[str, str] = {}  # by flag: the value of one that is given without any
    lists: Set[str] = frozenset()  # flags whose text goes on in the next argument if it ends with a comma
    aliases: Mapping[str, str] = {}  # flags by their other long names, both without dashes before them


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one flag for each option of the options dataclasses among its parameters.

    A parameter annotated with an options dataclass becomes the flags of `options_of`, with the defaults of the parameter's
    default if it has one; the function receives the object with the flags' values. A parameter annotated with a Knob becomes
    one flag. All other parameters are typer's as they are. The result's `spellings` are those of its flags. --help names other
    long names in a flag's text, since they would leave no room in the column of names.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Any, list[Option]]] = {}
    knobs: list[tuple[str, Knob]] = []
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint) and isinstance(hint, type):
            defaults = hint() if parameter.default is parameter.empty else parameter.default
            groups[parameter.name] = defaults, options_of(hint, defaults)
            parameters += [_flag(o.name, o.kind, o.default, o.knob) for o in groups[parameter.name][1]]
            knobs += [(o.name, o.knob) for o in groups[parameter.name][1]]
        elif knob := knob_of(hint):
            knobs.append((parameter.name, knob))
            default = MISSING if parameter.default is parameter.empty else parameter.default
            parameters.append(_flag(parameter.name, get_args(hint)[0], default, knob))
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def with_flags(**flags: Any) -> None:
        built = {}
        for name, (defaults, options) in groups.items():
            built[name] = with_values(defaults, {o.name: _field_value(flags.pop(o.name), o.knob) for o in options})
        command(**flags, **built)

    with_flags.spellings = Spellings(  # type: ignore[attr-defined]
        {flag_name(name): str(knob.bare) for name, knob in knobs if knob.bare is not None},
        {flag_name(name) for name, knob in knobs if knob.parse is not None},
        {alias.replace("_", "-"): name.replace("_", "-") for name, knob in knobs for alias in _long(knob.aliases)},
    )
    # What typer reads: the signature's annotations with typer's options in them, and the same without.
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {
        p.name: get_args(p.annotation)[0] if get_origin(p.annotation) is Annotated else p.annotation for p in parameters
    }
    return with_flags


def _field_value(value: Any, knob: Knob) -> Any:
    if isinstance(value, list):  # of a flag that may be given several times
        return tuple(value)
    return value if knob.unit == 1 else value * knob.unit


def _flag_value(value: Any, knob: Knob) -> Any:
    return value if knob.unit == 1 or value is None else value // knob.unit


def _long(aliases: Sequence[str]) -> list[str]:
    return [alias for alias in aliases if len(alias) > 1]


def text_of(ctx: typer.Context, name: str) -> str:
    """The text of an option that has a `parse`, as it was given."""
    return str(ctx.meta.get(f"{__name__}.{name}", ""))


def _parsed(name: str, parse: Callable[[str], Any]) -> Callable[..., Any]:
    """What typer calls with a flag's text to have its value; typer prints the error's text."""

    def parsed(ctx: typer.Context, text: str) -> Any:
        ctx.meta[f"{__name__}.{name}"] = text
        try:
            return parse(text)
        except ValueError as e:
            raise typer.BadParameter(str(e)) from e

    return parsed


def _flag(name: str, kind: Any, default: Any, knob: Knob) -> inspect.Parameter:
    option: Any = typer.Option(
        flag_name(name),  # named, since typer gives unnamed flags of yes or no a --no-… too
        *(f"-{alias}" for alias in knob.aliases if len(alias) == 1),
        help=" ".join([knob.help, *(f"Also {flag_name(alias)}." for alias in _long(knob.aliases))]),
        rich_help_panel=knob.panel,
        metavar=knob.metavar,
        show_default=knob.show_default,
        min=_flag_value(knob.least, knob) if knob.show_range else None,
        max=_flag_value(knob.most, knob) if knob.show_range else None,
        callback=_parsed(name, knob.parse) if knob.parse else one_of(*knob.choices) if knob.choices else None,
        autocompletion=(lambda: list(knob.choices)) if knob.choices else None,
    )
    if knob.parse:
        kind, default = str, str(default)
    if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
        kind, default = list[get_args(kind)[0]], list(default)  # type: ignore[misc]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else _flag_value(default, knob),
        annotation=Annotated[kind, option],
    )
