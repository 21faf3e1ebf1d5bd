"""Results in an object store (s3://, gs://, …), which has neither renaming nor locks.

What a store does have is enough: a put is whole or nothing, and what was put is what is read next. So files need no temporary
name, and a batch's record, put after its files, says that they are there. What a lock does for a folder, a lease does here.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, cast

from scale_rae.errors import InputError, OutputError, first_line, need, printable
from scale_rae.files import check_name, size_text
from scale_rae.jsonio import dump_json, parse_json

BEAT = 10.0  # seconds between a run's signs of life
SILENCE = 35.0  # without one, a run is taken for dead
SETTLE = 2.0  # seconds for a put of another start, at the same moment, to arrive


def results_folder(name: str) -> Path:
    """The folder of that name: a local one, or for a URL one in a store.

    A folder in a store is no `pathlib.Path`, but it has all methods of one that the results need.

    Raises:
        InputError: for a URL that nothing installed can open, and a name that no folder can have.
    """
    check_name(name, "output folder")
    scheme, is_url, rest = name.partition("://")
    if not is_url:
        return _home(name)
    if scheme == "file":
        if not rest.startswith("/"):
            raise InputError(f"{name}: a file's URL has three slashes and a full path, like file:///data/out")
        return Path(rest)
    need("ray", f"{name}: results in a store", "upath")
    from upath import UPath

    try:
        # What was listed once is not what is there now: other machines write.
        folder = UPath(name.rstrip("/"), use_listings_cache=False)
        _ = folder.fs
    except ImportError as e:
        raise InputError(f"{name}: {e} (with pip)") from e
    except ValueError as e:
        raise InputError(f"{name}: cannot be opened ({e})") from e
    return cast(Path, folder)


def _home(name: str) -> Path:
    """A folder's path; a `~` at its beginning is replaced, as a shell does."""
    try:
        return Path(name).expanduser()
    except RuntimeError as e:
        raise InputError(f"output folder {name}: no such user ({first_line(e)})") from e


def is_remote(folder: Path) -> bool:
    """Whether a folder is one in a store."""
    return not isinstance(folder, Path)


def put(path: Any, data: bytes) -> None:
    """Writes an object."""
    try:
        path.fs.pipe_file(path.path, data)
    except FileNotFoundError:
        if not path.parents[-1].exists():
            raise  # a bucket is not made for a slip of the pen
        path.fs.makedirs(path.parent.path, exist_ok=True)  # one of the stores that have real folders
        path.fs.pipe_file(path.path, data)


def get(path: Any, most: int) -> bytes | None:
    """An object's content, None when there is none.

    Raises:
        InputError: when it is larger than `most`, or the store refuses.
    """
    try:
        with path.fs.open(path.path, "rb") as file:
            data: bytes = file.read(most + 1)
    except FileNotFoundError:
        return None
    except Exception as e:  # every store has errors of its own
        raise InputError(f"{path}: cannot be read ({type(e).__name__}: {first_line(e)})") from e
    if len(data) > most:
        raise InputError(f"{path}: larger than {size_text(most)}, the most that is read of it")
    return data


class ObjectFiles:
    """What `Store` does with objects.

    What was put is believed without a checksum: the store answers for it.

    Args:
        work: the experiment's folder for what is not a result.
    """

    remote = True
    write_errors: tuple[type[Exception], ...] = (Exception,)  # every store has errors of its own

    def __init__(self, work: Path) -> None:
        self._work = work

    def make_folders(self, folders: Iterable[Path]) -> None:
        """Does nothing: a store has no folders."""

    def read(self, path: Path, most: int) -> bytes | None:
        """See `get`."""
        return get(path, most)

    def time_written(self, path: Any) -> int:
        """When an object was written, ns."""
        return int(path.fs.modified(path.path).timestamp() * 1e9)

    def write(self, path: Path, data: bytes, durable: bool = True) -> None:
        """See `put`."""
        put(path, data)

    def write_first(self, path: Path, data: bytes) -> None:
        """Writes an object. The launcher sees to it that no other worker does so at the same time."""
        put(path, data)

    def sync(self, folder: Path) -> None:
        """Does nothing: an object that was put is there."""

    def add_line(self, path: Path, line: str) -> None:
        """Prints a log's line to stderr, which Ray keeps: nothing can be added to an object."""
        print(line, file=sys.stderr, flush=True)

    def holder(self) -> str:
        """Empty: the run's lease says who has the folder."""
        return ""

    def lock_run(self, process: int, processes: int) -> Lease:
        """The run's lease.

        Raises:
            OutputError: when another run has it.
        """
        return Lease(self._work / "run.json")

    def lock_prompt(self, index: int) -> IO[str]:
        """A lock that is always free: the launcher gives a prompt to one worker only."""
        return io.StringIO()


class Lease:
    """Keeps other starts out of a folder in a store, by an object that changes every BEAT seconds.

    The object has this run's name. A start that finds one watches it for SILENCE seconds; if it does not change meanwhile, that
    start puts its own. Of two starts that put theirs at once the later wins; the other reads that and stops. That is less than
    a lock: a run that is cut off from the store for longer than SILENCE may draw alongside its successor until it reads the
    lease again. Nothing is damaged by that, since both put the same.

    Raises:
        OutputError: when another run is at work there, or the store refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._who = f"process {os.getpid()} on {socket.gethostname()}"
        self._id, self._beats = uuid.uuid4().hex, 0
        self.files: list[IO[str]] = []  # none, as `FileLocks` has
        self._lost_to = ""  # who has the folder instead
        self._ended = threading.Event()
        try:
            before = self._read()
            deadline = time.monotonic() + SILENCE
            while before and time.monotonic() < deadline:
                time.sleep(min(BEAT / 2, SILENCE))
                now = self._read()
                if now and now != before:
                    raise self._refusal(now)
                before = now
            self._put()
            time.sleep(SETTLE)
            now = self._read()
        except OutputError:
            raise
        except Exception as e:  # every store has errors of its own
            raise OutputError(f"{path.parent.parent}: cannot be written to ({type(e).__name__}: {e})") from e
        if now.get("run") != self._id:
            raise self._refusal(now)
        threading.Thread(target=self._keep, daemon=True).start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check(self) -> None:
        """Raises OutputError when another run has taken the folder over."""
        if self._lost_to:
            raise OutputError(f"{self._path.parent.parent}: {self._lost_to} has taken over here; this run stops")

    def close(self) -> None:
        """Lets the next start in at once."""
        self._ended.set()
        try:
            if self._read().get("run") == self._id:
                self._path.unlink(missing_ok=True)
        except Exception:
            pass  # the next start will wait until it is sure

    def _refusal(self, now: dict[str, Any]) -> OutputError:
        who = printable(str(now.get("who", "another process")))
        return OutputError(
            f"{self._path.parent.parent}: {who} is at work here; wait for it, or choose another --output-dir"
        )

    def _read(self) -> dict[str, Any]:
        """What the lease says; empty when there is none."""
        unreadable = {"who": "a run whose name cannot be read"}
        try:
            data = get(self._path, 1 << 16)
            value = {} if data is None else parse_json(data)
        except ValueError:
            return unreadable
        return value if isinstance(value, dict) else unreadable

    def _put(self) -> None:
        self._beats += 1
        put(self._path, dump_json({"run": self._id, "who": self._who, "beat": self._beats}).encode())

    def _keep(self) -> None:
        """Puts the lease anew at each beat, until another run has it."""
        while not self._ended.wait(BEAT):
            try:
                now = self._read()
                if now and now.get("run") != self._id:
                    self._lost_to = printable(str(now.get("who", "another process")))
                    return
                self._put()
            except Exception:
                continue  # the store may be back at the next beat
