"""The journal: a file of JSON lines with the verdicts so far, from which an evaluation resumes.

A verdict is reused as long as the picture's bytes and the prompt's metadata are the same. A line that a kill cut off is
skipped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from scale_rae.errors import InputError, OutputError
from scale_rae.files import check_file
from scale_rae.jsonio import dump_json, parse_json
from scale_rae.scaling.local_files import append
from scale_rae.scaling.locks import try_lock

_HEAD = b'{"judge": '  # how a journal begins


@dataclass(frozen=True)
class Mark:
    """An object that a judge found: class, box [x0, y0, x1, y1] in pixels, score, colour if asked for.

    `mask` is a PNG of its pixels in base64, black and white and at most 160
    pixels a side; None where there is no mask.
    """

    name: str
    box: list[float]
    score: float
    color: str | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Judged:
    """A judge's verdict on one picture; `size` is the picture's width and height.

    `details` has the boxes of each class as GenEval's results do; `marks` are the same objects, for the page. `problem` says
    why the picture could not be judged.
    """

    correct: bool = False
    reason: str = ""
    details: dict[str, list[list[float]]] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    problem: str | None = None

    def record(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Judged:
        """The verdict that `record` gave as JSON values. Raises TypeError or KeyError for anything else."""
        return cls(**{**record, "marks": [Mark(**mark) for mark in record["marks"]]})


@dataclass(frozen=True)
class Key:
    """Which picture a verdict is about: its name below the folder, hashes of its bytes and metadata."""

    name: str
    picture: str
    metadata: str


class Journal:
    """An open journal; `judged` has the verdicts in it. No other process can open it meanwhile.

    Raises:
        InputError: when it is no journal, or another judge's.
        OutputError: when another evaluation has the file open, or the file cannot be written.
    """

    def __init__(self, path: Path, judge: Mapping[str, Any]) -> None:
        self.path = path
        self.judged: dict[Key, Judged] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = append(path)
        except OSError as e:
            raise _cannot_write(path, e) from e
        try:
            if not try_lock(self._file.fileno()):
                raise OutputError(
                    f"{path}: another evaluation writes to it; wait for that one, or choose another --out"
                )
            self._read(dict(judge))
        except OSError as e:
            self._file.close()
            raise _cannot_write(path, e) from e
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, judged: Sequence[tuple[Key, Judged]]) -> None:
        """Adds the verdicts of a batch, and waits until the disk has them.

        Raises:
            OutputError: when they cannot be written.
        """
        lines = [
            dump_json({"key": asdict(key), "judged": value.record()}, ascii_only=True) + "\n" for key, value in judged
        ]
        try:
            self._file.write("".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            raise _cannot_write(self.path, e) from e
        self.judged.update(judged)

    def _read(self, judge: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        head, *lines = content.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                value = parse_json(line)
                self.judged[Key(**value["key"])] = Judged.of(value["judged"])
        recorded: Any = None
        try:
            recorded = parse_json(head)["judge"]
        except (ValueError, TypeError, KeyError) as e:
            if not _HEAD.startswith(content[: len(_HEAD)]) or lines:
                raise InputError(f"{self.path}: is not a journal of verdicts; choose another --out") from e
            # Else the file is new, or a kill cut its first line off.
        if recorded != judge:
            if self.judged:
                raise InputError(
                    f"{self.path}: holds verdicts of another judge: {_differences(recorded, judge)}; choose another --out"
                )
            self._file.truncate(0)  # that judge has judged nothing: perhaps it could not be loaded
            self._file.write(dump_json({"judge": judge}, ascii_only=True) + "\n")
        elif not content.endswith(b"\n"):
            self._file.write("\n")  # ends the line that a kill cut off
        self._file.flush()


def read_journal(path: Path) -> dict[str, Judged]:
    """The latest verdict of each picture in a journal, by the picture's name.

    Raises:
        InputError: naming the file, when it cannot be read.
    """
    check_file(path, "journal of verdicts")
    found: dict[str, Judged] = {}
    for line in path.read_bytes().split(b"\n")[1:]:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            value = parse_json(line)
            found[value["key"]["name"]] = Judged.of(value["judged"])
    return found


def _differences(recorded: Any, judge: Mapping[str, Any]) -> str:
    old = recorded if isinstance(recorded, dict) else {}
    names = [name for name in {**old, **judge} if old.get(name) != judge.get(name)]
    return "; ".join(f"{name} {dump_json(judge.get(name))} here, {dump_json(old.get(name))} there" for name in names)


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error}); the verdicts already in the file are kept"
    )
