"""File helpers: checks of names and kinds, bounded reading, hashes, durable writing, exchanging two names."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import select
import shutil
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from scale_rae.errors import InputError, ScaleRAEError, counted

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CHUNK = 1 << 20
_PIPE_WAIT = 10  # seconds
_IS_WINDOWS = os.name == "nt"
_READER_WAIT = 5.0  # seconds
_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # errors of systems and file systems that cannot exchange


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins so is git-LFS's placeholder for a file that was not downloaded."""
    return start.startswith(_LFS_POINTER)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_name(path: str | os.PathLike[str], what: str, error: type[ScaleRAEError] = InputError) -> None:
    """Raises `error` for a name that no file can have, or that cannot be written down in a manifest.

    A name that is not UTF-8 reaches Python with half surrogates in it, which no JSON file, PNG text or terminal takes.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError as e:
        raise error(
            f"{what} {os.fsencode(name)!r}: the name is not valid UTF-8, so it cannot be recorded; rename it"
        ) from e
    if "\0" in name:
        raise error(f"{what} {name!r}: a file name cannot hold a null character")


def check_file(path: Path, what: str, error: type[ScaleRAEError] = InputError, pipes: bool = False) -> None:
    """Raises `error`, naming the file, unless it is a regular file (or, with `pipes`, a pipe)."""
    check_name(path, what, error)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError as e:
        raise error(f"{path}: no such {what}") from e
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: a `~user` that does not exist
        raise error(f"{path}: the {what} cannot be read ({getattr(e, 'strerror', None) or e})") from e
    if stat.S_ISDIR(kind):
        raise error(f"{path}: is a folder, not {_a(what)}")
    if not stat.S_ISREG(kind) and not (pipes and stat.S_ISFIFO(kind)):
        raise error(f"{path}: is not a regular file but a device, pipe or socket")


def lfs_error(path: Path, error: type[ScaleRAEError]) -> ScaleRAEError:
    """The error for a git-LFS pointer in place of a file."""
    return error(f"{path}: is a git-LFS pointer, not the file itself; run `git lfs pull` in its repository")


def read_bytes(path: Path, most: int, what: str, error: type[ScaleRAEError] = InputError, pipes: bool = False) -> bytes:
    """The content of a file, read once and at most `most` bytes of it.

    `what` names the kind of file in messages ("image", "manifest"). `pipes` also takes a pipe, as `--image /dev/stdin` and
    `--image <(…)` are; anything else that is no regular file is refused.

    Raises:
        `error`: naming the file, when it is missing, a folder, no regular file, unreadable, a git-LFS pointer, larger than
            `most`, or a pipe that nothing writes to.
    """
    check_file(path, what, error, pipes)
    parts: list[bytes] = []
    size = 0
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                start = _start_of_pipe(file)
                if start is None:
                    raise error(f"{path}: is a pipe that nothing writes to")
                parts, size = [start], len(start)
            while part := file.read(min(_CHUNK, most + 1 - size)):
                parts.append(part)
                size += len(part)
    except OSError as e:
        raise error(f"{path}: the {what} cannot be read ({e.strerror or e})") from e
    if size > most:
        raise error(f"{path}: larger than {size_text(most)}, the most that is read of {_a(what)}")
    data = b"".join(parts)
    if is_lfs_pointer(data):
        raise lfs_error(path, error)
    return data


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that is not there yet, and waits until the disk has it.

    Raises:
        OSError: FileExistsError, or what writing raises.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # some file systems notice a full disk only here


def replace(source: Path, target: Path) -> None:
    """Renames a file, in the place of `target` if that exists.

    Windows forbids that while any process has the target open, so there it is tried again for a few seconds.

    Raises:
        OSError: as a rename does.
    """
    end = time.monotonic() + _READER_WAIT
    while True:
        try:
            source.replace(target)
        except PermissionError:
            if not _IS_WINDOWS or time.monotonic() >= end:
                raise
            time.sleep(0.02)
        else:
            return


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A block that writes the file it is given; when it ends without an error, the file takes the place of `target`."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield fresh
        replace(fresh, target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Removes what `replacing` had begun to write into a folder when its process was killed; nothing may be writing there."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+-\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A block that fills the empty folder it is given; when it ends without an error, the folder takes the place of `target`.

    After an error the folder is removed, which gives a full disk its space back.
    """
    fresh = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        shutil.rmtree(target, ignore_errors=True)
        fresh.replace(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _a(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a pipe at once, although nothing may have opened it for writing."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _start_of_pipe(file: FileIO) -> bytes | None:
    """The first byte of a pipe, or nothing yet; None if no program opens it for writing within _PIPE_WAIT seconds."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    found = poll.poll(1000 * _PIPE_WAIT)  # data, or a writer that has come and gone
    start = file.read(1)  # None: there is a writer, but no data yet
    os.set_blocking(file.fileno(), True)
    return None if start == b"" and not found else start or b""


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one folder atomically; false if the system cannot do that.

    Raises:
        OSError: as a rename does.
    """
    names = os.fsencode(one), os.fsencode(other)
    libc: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_EXCHANGE))
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, ctypes.c_uint(_EXCHANGE))
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in _UNKNOWN:
        raise OSError(code, os.strerror(code), str(one), None, str(other))
    return not failed


def size_text(count: int) -> str:
    """A number of bytes in words: "64 MiB"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return counted(count, "byte")
