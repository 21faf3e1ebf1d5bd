"""JSON: bounded reading, typed fields with errors that name file and field, strict writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from scale_rae.errors import ConfigError, ScaleRAEError, first_line
from scale_rae.files import read_bytes

MOST_BYTES = 32 << 20  # per JSON file; the largest in a checkpoint, an index of shards, has a few MB

MOST_DIGITS = 400  # per integer; no float has more, and the time to parse them grows with the square
MOST_COUNT = 1 << 20  # default limit of a count; no published network has so wide a layer
_LARGEST_FLOAT = 1e300
_REQUIRED = object()
_KINDS = {int: "a whole number", str: "a text", bool: "true or false", list: "a list", dict: "an object"}


def dump_json(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """Strict JSON text; with `ascii_only`, other characters are escaped."""
    return json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """`dump_json` in UTF-8 or, where a text holds half a surrogate pair, which only JSON's escapes can carry, in ASCII."""
    try:
        return dump_json(value, indent).encode()
    except UnicodeEncodeError:
        return dump_json(value, indent, ascii_only=True).encode()


def parse_json(data: bytes | str, constants: bool = False) -> Any:
    """The value of JSON text; bytes are UTF-8, with or without a byte order mark.

    `constants` also takes NaN and Infinity, which are not JSON but which Python's own writer puts into configurations.

    Raises:
        ValueError: saying why, for anything else: other encodings, nesting too deep, integers of over MOST_DIGITS.
    """
    text = data.removeprefix("\ufeff") if isinstance(data, str) else data.decode("utf-8-sig")
    try:
        return json.loads(text, parse_constant=None if constants else _refuse, parse_int=_integer)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def read_json(path: Path, what: str = "file", error: type[ScaleRAEError] = ConfigError) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        `error`: naming the file, when it is missing, unreadable, over MOST_BYTES, not JSON, or not an object.
    """
    return parse_object(read_bytes(path, MOST_BYTES, what, error), path, error)


def parse_object(data: bytes, where: Path | str, error: type[ScaleRAEError] = ConfigError) -> dict[str, Any]:
    """`read_json` on the bytes of a file; `where` names it in errors."""
    try:
        value = parse_json(data, constants=True)
    except ValueError as e:
        raise error(f"{where}: not valid JSON ({first_line(e)})") from e
    if not isinstance(value, dict):
        raise error(f"{where}: must hold a JSON object, not {type(value).__name__}")
    return value


class Fields:
    """Typed access to the fields of a JSON object. `null` counts as missing, and true and false are no numbers.

    Every method raises `error`, whose message begins with `where` (the file) and names the field.
    """

    def __init__(self, raw: dict[str, Any], where: Path | str, error: type[ScaleRAEError] = ConfigError) -> None:
        self.raw, self.where, self.error = raw, where, error

    def fail(self, field: str, problem: str) -> ScaleRAEError:
        """The error for a field's problem, to be raised."""
        return self.error(f"{self.where}: {field} {problem}")

    def get(self, field: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """The field's value, of `kind` or one of those kinds."""
        value = self.raw.get(field)
        if value is None:
            if default is _REQUIRED:
                raise self.fail(field, "is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(field, f"is {shortened(value)}, not {_kind_name(kind)}")
        return value

    def count(self, field: str, default: Any = _REQUIRED, least: int = 1, most: int = MOST_COUNT) -> int:
        """A whole number from `least` to `most`."""
        value: int = self.get(field, int, default)
        if not least <= value <= most:
            raise self.fail(field, f"is {shortened(value)}; must be {least} to {most}")
        return value

    def number(self, field: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        value = self.get(field, (int, float), default)
        if not -_LARGEST_FLOAT < value < _LARGEST_FLOAT:  # neither NaN nor infinity nor an integer beyond floats
            raise self.fail(field, f"is {shortened(value)}; must be a finite number")
        return float(value)

    def positive(self, field: str, default: Any = _REQUIRED) -> float:
        """A finite number above 0."""
        value = self.get(field, (int, float), default)
        if not 0 < value < _LARGEST_FLOAT:
            raise self.fail(field, f"is {shortened(value)}; must be a positive number")
        return float(value)

    def choice(self, field: str, allowed: tuple[str, ...], default: Any = _REQUIRED) -> str:
        """One of the texts in `allowed`."""
        value: str = self.get(field, str, default)
        if value not in allowed:
            raise self.fail(field, f"{shortened(value)} is not supported (supported: {', '.join(allowed)})")
        return value


def shortened(value: object) -> str:
    """A JSON value for a message, cut after 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _kind_name(kind: type | tuple[type, ...]) -> str:
    if kind == (int, float):
        return "a number"
    return " or ".join(_KINDS[k] for k in (kind if isinstance(kind, tuple) else (kind,)))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
