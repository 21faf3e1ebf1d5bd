"""Inputs of nodes, made from the package's options: an option's Knob gives the widget, its bounds and its tooltip.

An option that may be None is, at its default, the menu entry "none" or "default", the number 0 or an empty text. Options of several
numbers are texts with the numbers in them.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args, get_origin

from comfy_api.latest import io

from scale_rae.errors import OptionError, ScaleRAEError
from scale_rae.options import Option, options_of, with_values

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEFAULT = "default"
_TOOLTIPS = {  # where the help text speaks of what only a flag can do, or does not say how an input is filled in
    "num_images": "Images to draw.",
    "seed": "The same seed draws the same image.",
    "guidance_interval": "Guide only where t is between two numbers, as in 0.1 0.9; noise is t = 1. Empty: everywhere.",
    "batch_size": "Images drawn at once. 0: 8 on the CPU, 32 elsewhere.",
    "max_candidates": "Begin at most this number of candidates.",
    "check_at": "Look at a half-formed candidate where its t comes nearest to this, and drop it if it will not do; noise is "
    "t = 1. Two numbers, as in 0.9 0.8: look twice. Empty: once, after two fifths of the evaluations.",
    "accept_reward": "Accept only images with at least this reward, which must be connected. Empty: an image that is not far "
    "below the mean of the candidates, by reward and confidence.",
}
_NOTHING = "none"  # the choice that means None
T = TypeVar("T")
Options = TypeVar("Options", bound="DataclassInstance")
P = ParamSpec("P")


def inputs_of(kind: type[DataclassInstance], without: Sequence[str] = ()) -> list[Any]:
    """One input per option of an options dataclass, in order, but for the options named in `without`."""
    return [_input(option) for option in options_of(kind) if option.name not in without]


def options_from(defaults: Options, values: Mapping[str, Any]) -> Options:
    """The options dataclass with the values of its inputs; values of other inputs are passed over.

    Raises:
        OptionError: naming the option, for a text that does not hold the option's numbers.
    """
    known = {option.name: option for option in options_of(type(defaults))}
    return with_values(defaults, {name: _value(known[name], given) for name, given in values.items() if name in known})


def naming_inputs(execute: Callable[P, T]) -> Callable[P, T]:
    """A node's `execute` whose errors name options as inputs are named, not as flags."""

    @functools.wraps(execute)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return execute(*args, **kwargs)
        except ScaleRAEError as e:
            e.args = (_without_flags(str(e)), *e.args[1:])
            raise

    return run


def _input(option: Option) -> Any:
    knob, kind, default = option.knob, _plain(option.kind), option.default
    about: dict[str, Any] = {
        "display_name": option.label,
        "tooltip": _TOOLTIPS.get(option.name) or _without_flags(knob.help),
    }
    if knob.choices:
        nothing = _NOTHING if _NOTHING in knob.choices else DEFAULT
        choices = list(dict.fromkeys([*([nothing] if default is None else []), *knob.choices]))
        return io.Combo.Input(option.name, options=choices, default=nothing if default is None else default, **about)
    if kind is bool:
        return io.Boolean.Input(option.name, default=default, **about)
    if kind is int:
        least = 0 if default is None else int(knob.least or 0)
        more = {} if knob.most is None else {"max": int(knob.most)}
        again = True if option.name == "seed" else None  # the menu that changes a seed after each run
        return io.Int.Input(option.name, default=default or 0, min=least, control_after_generate=again, **more, **about)
    if kind is float and default is not None:
        return io.Float.Input(option.name, default=default, min=knob.least, step=0.1, round=0.01, **about)
    return io.String.Input(option.name, default="", **about)


def _value(option: Option, given: Any) -> Any:
    """What an input's value is to its option."""
    kind = _plain(option.kind)
    if option.default is None and given in (_NOTHING, DEFAULT, "", 0):
        return None
    if kind is float and isinstance(given, str):
        return _numbers(option, given)[0]
    if get_origin(kind) is tuple:
        return _numbers(option, given)
    return given


def _numbers(option: Option, text: str) -> tuple[float, ...]:
    """The numbers in a text, as many as the option has."""
    kind = _plain(option.kind)
    parts = (float,) if kind is float else get_args(kind)
    try:
        numbers = tuple(float(word) for word in text.replace(",", " ").split())
        if len(numbers) != len(parts) and Ellipsis not in parts:
            raise ValueError
    except ValueError:
        wanted = "numbers" if Ellipsis in parts else "a number" if len(parts) == 1 else f"{len(parts)} numbers"
        raise OptionError(f"{option.label} {text!r:.40}: must be {wanted}, or empty for the default") from None
    return numbers


def _plain(kind: Any) -> Any:
    """The type without None."""
    if isinstance(kind, types.UnionType):
        return next(part for part in get_args(kind) if part is not types.NoneType)
    return kind


def _without_flags(text: str) -> str:
    """A text in which options are named as inputs are: "--batch-size" is "batch size"."""
    return re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", " "), text)
