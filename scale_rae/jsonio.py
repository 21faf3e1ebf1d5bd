"""JSON files: read with bounds and errors that name the file, written strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from scale_rae.errors import ConfigError, ScaleRAEError, first_line
from scale_rae.files import read_bytes

MOST_BYTES = 32 << 20  # of one JSON file; the largest that a checkpoint brings, an index of shards, has a few MB

MOST_DIGITS = 400  # of an integer; no float has more, and their time grows with the square


def dump_json(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """Strict JSON in UTF-8's own letters, or in ASCII with escapes for the others."""
    return json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False)


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
    data = read_bytes(path, MOST_BYTES, what, error)
    try:
        value = parse_json(data, constants=True)
    except ValueError as e:
        raise error(f"{path}: not valid JSON ({first_line(e)})") from e
    if not isinstance(value, dict):
        raise error(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
