"""Results of an evaluation in GenEval's own format: one picture per line of results.jsonl.

Lines are as pandas writes JSON lines. GenEval's summary_scores.py reads these files, and this module reads those of
GenEval's evaluate_images.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scale_rae.errors import InputError, first_line
from scale_rae.files import read_bytes
from scale_rae.jsonio import parse_json, shortened

RESULTS = "results.jsonl"
JUDGES = ("geneval", "shapes")  # folders of results are named by them
THUMBNAIL = 224  # longest side of an image on the page, in pixels
_MOST_BYTES = 4 << 30  # a line has about 1 KB; the largest evaluations have some 100,000 lines


@dataclass(frozen=True)
class Result:
    """One picture's verdict; `filename` is below the folder, `metadata` and `details` are JSON texts."""

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: str
    details: str

    @property
    def prompt_key(self) -> str:
        """The prompt's identity across folders: GenEval's clauses and the prompt's text, as JSON text."""
        try:
            record = parse_json(self.metadata)
        except ValueError:
            return self.metadata
        if not isinstance(record, dict):
            return self.metadata
        return json.dumps([record.get(name) for name in ("tag", "include", "exclude", "prompt")], sort_keys=True)

    @property
    def reasons(self) -> list[str]:
        """The kinds of what is wrong, as `reason_kinds` finds them."""
        return reason_kinds(self.reason)


_KINDS = (
    ("missing object", re.compile(r"expected \S.*>=\d+, found \d+")),
    ("too many", re.compile(r"expected \S.*<\d+, found \d+|expected no \S.*, found \d+")),
    ("wrong colour", re.compile(r"expected \S.*>=\d+, found \d+ \w.*")),
    ("wrong position", re.compile(r"(expected \S.* (left of|right of|above|below) .*, found .*)|no target for .*")),
    ("unclear object", re.compile(r"unclear .*")),
)
REASON_KINDS = (*(name for name, _ in _KINDS), "other")


def reason_kinds(reason: str) -> list[str]:
    """The kinds of the lines of a reason, in the order of REASON_KINDS; none for a right picture."""
    found = {
        next((name for name, form in _KINDS if form.fullmatch(line)), "other") for line in reason.split("\n") if line
    }
    return [name for name in REASON_KINDS if name in found]


def default_out(folder: Path, judge: str) -> Path:
    """Where results of a folder are written by default: <folder>_<judge>/results.jsonl, beside it."""
    return folder.with_name(f"{folder.name}_{judge}") / RESULTS


def results_beside(folder: Path) -> tuple[str, dict[str, Result]] | None:
    """The judge and, by the pictures' names, the results of a folder, where `default_out` has some.

    GenEval's come before those of the bundled model's judge.

    Raises:
        InputError: when the file cannot be read.
    """
    for judge in JUDGES:
        if (path := default_out(folder, judge)).is_file():
            return judge, {result.filename: result for result in read_results(path)}
    return None


def beside(out: Path, ending: str) -> Path:
    """A file beside a results file: results.html, results.journal.jsonl, …"""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.{ending}")


def to_lines(results: Iterable[Result]) -> bytes:
    """The content of results.jsonl, as pandas writes it: compact JSON in ASCII, slashes escaped."""
    lines = (json.dumps(asdict(result), separators=(",", ":")) for result in results)
    return "".join(f"{line}\n".replace("/", "\\/") for line in lines).encode("ascii")


def read_results(path: Path) -> list[Result]:
    """The results in a file, this program's or the original's.

    Raises:
        InputError: naming the file, and the line and field, when it cannot be read or is no such file.
    """
    content = read_bytes(path, _MOST_BYTES, "results file")
    results = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                results.append(_result(parse_json(line)))
            except ValueError as e:
                raise InputError(f"{path}: line {number}: not a line of GenEval's results ({first_line(e)})") from e
    if not results:
        raise InputError(f"{path}: holds no results")
    return results


def _result(value: Any) -> Result:
    """Raises ValueError, naming the field, for anything but a result."""
    if not isinstance(value, Mapping):
        raise ValueError(f"is {shortened(value)}, not an object")
    values: dict[str, Any] = {}
    for field in fields(Result):
        found = value.get(field.name, "" if field.name == "details" else None)
        wanted = bool if field.name == "correct" else str
        if field.name == "reason" and found is None:
            found = ""
        if not isinstance(found, wanted):
            raise ValueError(f"{field.name} is {shortened(found)}")
        values[field.name] = found
    return Result(**values)
