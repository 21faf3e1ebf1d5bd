"""Prompt files: one prompt per line (.txt), or one JSON record per line (.jsonl, .ndjson, .json)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_rae.errors import InputError, counted, first_line
from scale_rae.files import read_bytes, size_text
from scale_rae.jsonio import parse_json
from scale_rae.prompt import clean_message

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".ods", ".parquet")  # whose lines would be drawn, columns and all
MOST_BYTES = 256 << 20  # per prompt file: two million long prompts
MOST_TEMPLATE_BYTES = 1 << 20
MOST_PROBLEMS = 10  # bad lines that an error names at most
MOST_INDEX = 2**63  # indices are parts of file names, and 64-bit numbers to readers of the results


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of a file. `line` counts from 1; `index` is unique in the file; `extra` are the record's other fields."""

    line: int
    prompt: str
    index: int
    extra: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[PromptRecord]:
    """The prompts of a file, in its order. Blank lines are skipped; in a text file, every other line is a prompt.

    A record is a JSON object with "prompt" and optionally "index", a whole number (default: the number of prompts before).

    Raises:
        InputError: for a file that is a table, cannot be read or holds no prompt; naming lines that are not UTF-8, are no record, have
            no text, or repeat an index.
    """
    path = Path(path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        raise InputError(f"{path}: is a table; write its prompts to a .txt file, one a line, or to .jsonl")
    content = read_bytes(path, MOST_BYTES, "prompt file", pipes=True)
    return parse_prompts(content, str(path), path.suffix.lower() in RECORD_SUFFIXES)


def parse_prompts(content: bytes, name: str, as_records: bool | None = None) -> list[PromptRecord]:
    """The prompts in a file's content, as `read_prompts` gives them; `name` begins messages.

    `as_records` says whether lines are JSON records; None: they are if the first one is.
    """
    if len(content) > MOST_BYTES:
        raise InputError(f"{name}: larger than {size_text(MOST_BYTES)}, the most that is read of prompts")
    content = content.removeprefix(b"\xef\xbb\xbf")
    if problem := _not_lines(content):
        raise InputError(f"{name}: {problem}")
    if as_records is None:
        first = _value(content.lstrip().split(b"\n", 1)[0])
        as_records = isinstance(first, dict) and "prompt" in first
    records: list[PromptRecord] = []
    problems: list[str] = []
    more = 0  # bad lines beyond MOST_PROBLEMS
    line_of: dict[int, int] = {}
    ordinal = 0  # prompts before this line, bad ones included
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            record = (_parse_record if as_records else _parse_text)(_decode(raw), number, ordinal)
            if record.index in line_of:
                raise InputError(f"index {record.index} is that of line {line_of[record.index]} already")
            line_of[record.index] = number
            records.append(record)
        except InputError as e:
            if len(problems) < MOST_PROBLEMS:
                problems.append(f"line {number}: {e}")
            else:
                more += 1
        ordinal += 1
    if problems:
        others = f"; and {counted(more, 'more line')}" if more else ""
        raise InputError(f"{name}: {'; '.join(problems)}{others}")
    if not records:
        raise InputError(f"{name}: holds no prompts")
    return records


def _not_lines(content: bytes) -> str | None:
    """Why a file cannot have lines of UTF-8, None where it may have them."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or _looks_like_utf16(content):
        return "line 1: not valid UTF-8: the file is UTF-16; save it as UTF-8"
    if b"\n" not in content and b"\r" in content.strip():
        return "its lines end by carriage returns alone (CR), as on old Macs; save it with line feeds (LF or CRLF)"
    if content.lstrip()[:1] == b"[" and content.rstrip()[-1:] == b"]" and isinstance(_value(content), list):
        return 'is one JSON array; write a record a line, without the brackets and commas around: {"prompt": "…"}'
    return None


def _value(content: bytes | str) -> Any:
    """The value of JSON text, None for other text."""
    try:
        return parse_json(content)
    except ValueError:
        return None


def _looks_like_utf16(content: bytes) -> bool:
    """Whether exactly every second byte is zero, as in Latin letters in UTF-16 without a byte order mark."""
    if len(content) < 8 or len(content) % 2:
        return False
    halves = content[::2], content[1::2]
    return any(not one.strip(b"\0") and b"\0" not in other for one, other in (halves, halves[::-1]))


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"not valid UTF-8 (byte {e.start + 1} of the line)") from e


def _parse_text(line: str, number: int, ordinal: int) -> PromptRecord:
    if line.startswith("{") and isinstance(record := _value(line), dict) and "prompt" in record:
        raise InputError("is a JSON record, and not a prompt: give the file a name that ends by .jsonl")
    clean_message(line)
    if any(ord(c) < 32 and c != "\t" for c in line.strip()):  # other encodings can be valid UTF-8 byte by byte
        raise InputError("holds control characters; if the file is UTF-16 or UTF-32, save it as UTF-8")
    return PromptRecord(number, line.strip(), ordinal)


def _parse_record(line: str, number: int, ordinal: int) -> PromptRecord:
    try:
        record = parse_json(line)
    except json.JSONDecodeError as e:
        raise InputError(f"not valid JSON ({e.msg} at column {e.colno})") from e
    except ValueError as e:  # NaN, numbers of thousands of digits, deep nesting
        raise InputError(f"not valid JSON ({first_line(e)})") from e
    if not isinstance(record, dict):
        raise InputError(f'must be an object like {{"prompt": "…"}}, not {type(record).__name__}')
    prompt, index = record.pop("prompt", None), record.pop("index", ordinal)
    if not isinstance(prompt, str):
        raise InputError('has no "prompt" text' if prompt is None else '"prompt" is not text')
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < MOST_INDEX:
        raise InputError(f'"index" is {json.dumps(index):.40}, not a whole number of at least 0 and below 2^63')
    clean_message(prompt)
    return PromptRecord(number, prompt.strip(), index, record)


def read_template(path: Path) -> str:
    """The text of a question template.

    Raises:
        InputError: naming the file, when it is missing, unreadable, not UTF-8, or empty.
    """
    try:
        text = read_bytes(path, MOST_TEMPLATE_BYTES, "question template", pipes=True).decode("utf-8-sig").strip()
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: the question template is not valid UTF-8") from e
    if not text:
        raise InputError(f"{path}: the question template is empty")
    return text
