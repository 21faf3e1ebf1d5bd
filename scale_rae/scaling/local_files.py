"""Files of an experiment in a folder, which machines may share: whole or not at all, with locks.

A file is written under a temporary name, synced and renamed. No link is followed where something is written: somebody else may
have put it there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from scale_rae.errors import InputError, OutputError, printable
from scale_rae.files import read_bytes, replace
from scale_rae.scaling.locks import can_share, try_lock

LOCK_WAIT = 3.0  # seconds for the processes of a killed run to be gone


def cannot_write(path: Path, error: Exception) -> OutputError:
    """The error for a result that cannot be written."""
    return OutputError(
        f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); make room or permission there and start "
        "again: what is finished is kept"
    )


def append(path: Path) -> IO[str]:
    """A text file to add to.

    Raises:
        OSError: as `open` does, and when there is a link or anything but a regular file.
    """
    return os.fdopen(_open(path, os.O_APPEND), "a", encoding="utf-8")


class FileLocks:
    """Locks that are held until closed here and in every process that got `files`."""

    def __init__(self) -> None:
        self.files: list[IO[str]] = []

    def __enter__(self) -> FileLocks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check(self) -> None:
        """Does nothing: nobody takes a lock away."""

    def close(self) -> None:
        """Gives the locks back."""
        for file in self.files:
            file.close()


class LocalFiles:
    """What `Store` does with files of the local file system.

    Args:
        work: the experiment's folder for what is not a result.
        writer: names `temporary`, the file that this process writes before it is renamed.
    """

    remote = False
    write_errors: tuple[type[Exception], ...] = (OSError,)  # what writing may raise

    def __init__(self, work: Path, writer: str) -> None:
        self._work = work
        self.temporary = work / "tmp" / writer
        self._writing = threading.Lock()  # threads of a process share the temporary file

    def make_folders(self, folders: Iterable[Path]) -> None:
        """Makes the experiment's own folders, and those given.

        Raises:
            OSError: when one cannot be made, or a folder of the run is a symbolic link.
        """
        own = [self._work, self._work / "batches", self._work / "locks", self._work / "tmp"]
        for folder in (*own, *folders):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in own:
            if folder.is_symlink():
                raise OSError(errno.ELOOP, f"{folder} is a symbolic link, which is not followed")

    def read(self, path: Path, most: int) -> bytes | None:
        """A file's content, None when it is missing.

        Raises:
            InputError: when it cannot be read, is no regular file, or is larger than `most` bytes.
        """
        try:
            return read_bytes(path, most, "file")
        except InputError as e:
            if isinstance(e.__cause__, FileNotFoundError):
                return None
            raise

    def time_written(self, path: Path) -> int:
        """When a file was written, ns."""
        return path.stat().st_mtime_ns

    def write(self, path: Path, data: bytes, durable: bool = True) -> None:
        """Writes a file, whole or not at all, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing:
            try:
                _make(self.temporary, data, durable)
                replace(self.temporary, path)
            except OSError:
                self.temporary.unlink(missing_ok=True)
                raise

    def write_first(self, path: Path, data: bytes) -> None:
        """Writes a file unless it is there already, also where several workers try at once."""
        mine = self.temporary.with_suffix(".claim")
        _make(mine, data)
        try:
            os.link(mine, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                replace(mine, path)
        finally:
            mine.unlink(missing_ok=True)
        self.sync(path.parent)

    def sync(self, folder: Path) -> None:
        """Has the names in a folder outlive a loss of power, on file systems that can."""
        if not hasattr(os, "O_DIRECTORY"):  # Windows, which opens no folder
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(descriptor)

    def add_line(self, path: Path, line: str) -> None:
        """Adds a line to a log, which is opened for each line; a full disk loses no more than lines."""
        with contextlib.suppress(OSError), append(path) as file:
            file.write(f"{line}\n")

    def holder(self) -> str:
        """Who has the run's lock, as written in the folder; empty where that cannot be read."""
        try:
            return printable((self.read(self._work / "holder", 1 << 10) or b"").decode().strip())
        except (InputError, ValueError):
            return ""

    def lock_run(self, process: int, processes: int) -> FileLocks:
        """A run's locks: exclusive, or shared by `processes` that were started together.

        Raises:
            OutputError: when another run has them, or locks cannot be shared.
        """
        if processes > 1 and not can_share():
            raise OutputError(
                f"{self._work.parent}: this operating system has no flock, by which processes that were started together share "
                "an experiment; start one process, with all devices in --devices"
            )
        locks = FileLocks()
        wanted = [(self._work / "run.lock", processes > 1)]
        if processes > 1:
            wanted.append((self._work / f"rank-{process}.lock", False))
        for path, shared in wanted:
            file = _lock(path, shared, LOCK_WAIT)
            if file is None:
                locks.close()
                holder = self.holder() or "another process"
                raise OutputError(
                    f"{self._work.parent}: {holder} is at work here; wait for it, or choose another --output-dir"
                )
            locks.files.append(file)
        if process == 0:
            holder, path = f"process {os.getpid()} on {socket.gethostname()}", self._work / "holder"
            try:
                self.write(path, holder.encode(), durable=False)
            except OSError as e:
                raise cannot_write(path, e) from e
        return locks

    def lock_prompt(self, index: int) -> IO[str] | None:
        """A prompt's lock, held until the file is closed; None when another worker has it."""
        return _lock(self._work / "locks" / f"{index:05}", False, 0.0)


def _lock(path: Path, shared: bool, patience: float) -> IO[str] | None:
    """A locked file, None when another process still has the lock after `patience` seconds.

    Raises:
        OutputError: when the file cannot be opened, or the file system has no locks.
    """
    try:
        file = append(path)
    except OSError as e:
        raise cannot_write(path, e) from e
    deadline = time.monotonic() + patience
    while True:
        try:
            if try_lock(file.fileno(), shared):
                return file
        except OSError as e:
            file.close()
            raise OutputError(f"{path}: this file system knows no locks ({e.strerror}); use another folder") from e
        if time.monotonic() >= deadline:
            file.close()
            return None
        time.sleep(0.1)


def _open(path: Path, flags: int) -> int:
    """A descriptor of a file to write to, made if it is missing.

    Raises:
        OSError: when there is a link, which somebody else may have put there, or anything but a regular file.
    """
    flags |= os.O_WRONLY | os.O_CREAT
    # Without O_NONBLOCK, a pipe waits for its reader.
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)  # Windows has only the last
    try:
        if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        descriptor = os.open(path, flags, 0o666)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise OSError(e.errno, "a symbolic link, which is not followed") from e
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def _make(path: Path, data: bytes, durable: bool = True) -> None:
    """Makes a file anew, in place of what a killed run left or somebody else put there."""
    try:
        descriptor = _open(path, os.O_EXCL)
    except FileExistsError:
        path.unlink()
        descriptor = _open(path, os.O_EXCL)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())  # some file systems notice a full disk only here
