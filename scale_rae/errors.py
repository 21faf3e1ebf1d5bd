"""All error classes, and helpers that print errors and untrusted text in one line.

Each error says what is wrong, where, and what would be right. The command line prints it in one line and exits 1.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

# Everything a terminal acts on instead of showing: C0 and C1 controls, and marks that turn the direction of text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class ScaleRAEError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(ScaleRAEError):
    """A config.json that is missing, unreadable, or asks for something unsupported."""


class CheckpointError(ScaleRAEError):
    """Weights, tokenizer or decoder files that are missing, damaged, or do not fit their config."""


class HubError(ScaleRAEError):
    """A model hub that could not be reached, or that refused."""


class InputError(ScaleRAEError):
    """A prompt, image, latent or option value that cannot be used."""


class DataError(InputError):
    """Training data with bad records; `problems` has a line per bad record that names its file and place."""

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


class TrainingError(ScaleRAEError):
    """Training that cannot continue: a loss is not finite, or the checkpoint has other options."""


class OptionError(InputError):
    """An option's value that no run can use: out of its range, or not of its form. The command line exits 2."""


class DeviceError(ScaleRAEError):
    """A device that is not there, or whose memory is too small."""


class OutputError(ScaleRAEError):
    """A result that could not be written."""


class MissingExtraError(ScaleRAEError):
    """A package that an optional part of scale-rae needs and that is not installed."""


def need(extra: str, feature: str, *modules: str) -> None:
    """Raises MissingExtraError unless all `modules` of the optional `extra` that `feature` needs are installed."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(
            f'{feature}: needs {", ".join(missing)}, which {verb} not installed; pip install "scale-rae[{extra}]"'
        )


def missing_package(error: ModuleNotFoundError) -> str:
    """One line on a package that scale-rae stands on and this Python does not have; needs nothing but Python itself."""
    while error.name is None and isinstance(error.__cause__, ModuleNotFoundError):  # as transformers puts it
        error = error.__cause__
    name = (error.name or str(error)).split(".")[0]
    root = Path(__file__).parents[1]
    activate = root / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "activate"
    if activate.is_file() and Path(sys.prefix).resolve() != (root / ".venv").resolve():
        command = activate if os.name == "nt" else f"source {activate}"
        remedy = f"activate the environment that has it ({command}), or call {activate.with_name('scale-rae')}"
    elif (root / "Makefile").is_file():
        remedy = "run `make demo`, which installs everything into .venv, or: pip install -e ."
    else:
        remedy = "pip install scale-rae"
    return f"the package {name} is not installed for {sys.executable}; {remedy}"


def printable(
    text: str, lines: bool = False, escape: Callable[[str], str] = lambda character: ascii(character)[1:-1]
) -> str:
    """Text from a file or a model as a terminal may show it: control characters are escaped (`\\x1b`, or as `escape` does).

    Line ends and tabs stay when `lines` is true.
    """
    return _CONTROLS.sub(lambda m: m[0] if lines and m[0] in "\n\t" else escape(m[0]), text)


def shorten(text: str, most: int = 60) -> str:
    """The text, or its beginning and an ellipsis when it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def counted(number: float, noun: str, form: str = "") -> str:
    """A number with its noun: "1 image", "3 images". `form` is the format of the number."""
    return f"{number:{form}} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's first line."""
    return first_line(error).split(". ", 1)[0]


def last_line(error: BaseException) -> str:
    """The last line of an error's text that is not empty, or the name of its class."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
