"""Prompt files: a prompt a line (.txt), or a JSON record a line (.jsonl, .ndjson, .json)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from scale_rae.errors import InputError
from scale_rae.prompt import clean_message

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of a file. `line` counts from 1; `index` is unique in the file; `extra` is all else a record says."""

    line: int
    prompt: str
    index: int
    extra: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[PromptRecord]:
    """The prompts of a file, in its order. Blank lines are skipped; nothing else is special in a text file.

    A record is a JSON object with "prompt" and perhaps "index" (a whole number; default: how many prompts come before).

    Raises:
        InputError: when the file cannot be read or holds no prompt, or naming every line that is not UTF-8, not such a
            record, empty of text, or repeats an index.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as e:
        raise InputError(f"{path}: no such prompt file") from e
    except OSError as e:
        raise InputError(f"{path}: the prompt file cannot be read ({e.strerror})") from e
    as_records = path.suffix.lower() in RECORD_SUFFIXES
    records: list[PromptRecord] = []
    problems: list[str] = []
    line_of: dict[int, int] = {}
    ordinal = 0  # prompts before this line, bad ones included
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            record = (_parse_record if as_records else _parse_text)(_decode(raw), number, ordinal)
            if record.index in line_of:
                raise InputError(f"index {record.index} is that of line {line_of[record.index]} already")
            line_of[record.index] = number
            records.append(record)
        except InputError as e:
            problems.append(f"line {number}: {e}")
        ordinal += 1
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    if not records:
        raise InputError(f"{path}: holds no prompts")
    return records


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"not valid UTF-8 (byte {e.start + 1} of the line)") from e


def _parse_text(line: str, number: int, ordinal: int) -> PromptRecord:
    clean_message(line)
    return PromptRecord(number, line.strip(), ordinal)


def _parse_record(line: str, number: int, ordinal: int) -> PromptRecord:
    try:
        record = json.loads(line, parse_constant=_refuse)
    except json.JSONDecodeError as e:
        raise InputError(f"not valid JSON ({e.msg} at column {e.colno})") from e
    except (ValueError, RecursionError) as e:  # NaN, numbers of thousands of digits, brackets in brackets in …
        raise InputError(f"not valid JSON ({e})") from e
    if not isinstance(record, dict):
        raise InputError(f'must be an object like {{"prompt": "…"}}, not {type(record).__name__}')
    prompt, index = record.pop("prompt", None), record.pop("index", ordinal)
    if not isinstance(prompt, str):
        raise InputError('has no "prompt" text' if prompt is None else '"prompt" is not text')
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise InputError(f'"index" is {json.dumps(index)[:40]}, not a whole number of at least 0')
    clean_message(prompt)
    return PromptRecord(number, prompt.strip(), index, record)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def read_template(path: Path) -> str:
    """The text of a question template.

    Raises:
        InputError: naming the file, when it is missing, unreadable, not UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError as e:
        raise InputError(f"{path}: no such question template") from e
    except OSError as e:
        raise InputError(f"{path}: the question template cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: the question template is not valid UTF-8") from e
    if not text:
        raise InputError(f"{path}: the question template is empty")
    return text
