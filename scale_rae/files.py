"""Files that somebody else chose: checked names, and reading that neither hangs nor fills the memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from scale_rae.errors import InputError, ScaleRAEError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CHUNK = 1 << 20


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins so is git-LFS's placeholder for a file that was not downloaded."""
    return start.startswith(_LFS_POINTER)


def check_name(path: str | os.PathLike[str], what: str) -> None:
    """Raises InputError for a name that no file can have, or that cannot be written down in a manifest.

    A name that is not UTF-8 reaches Python with half surrogates in it, which no JSON file, PNG text or terminal takes.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError as e:
        raise InputError(
            f"{what} {os.fsencode(name)!r}: the name is not valid UTF-8, so it cannot be recorded; rename it"
        ) from e
    if "\0" in name:
        raise InputError(f"{what} {name!r}: a file name cannot hold a null character")


def read_bytes(path: Path, most: int, what: str, error: type[ScaleRAEError] = InputError, pipes: bool = False) -> bytes:
    """The content of a file, read once and at most `most` bytes of it.

    `what` names the kind of file in messages ("image", "manifest"). `pipes` also takes a pipe or a character device, as
    `--image /dev/stdin` is; anything else that is no regular file is refused.

    Raises:
        `error`: naming the file, when it is missing, a folder, no regular file, unreadable, a git-LFS pointer, or larger
            than `most`.
    """
    check_name(path, what)
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise error(f"{path}: is a folder, not a {what}")
        if not stat.S_ISREG(kind) and not (pipes and (stat.S_ISFIFO(kind) or stat.S_ISCHR(kind))):
            raise error(f"{path}: is not a regular file but a device, pipe or socket")
        parts: list[bytes] = []
        size = 0
        with path.open("rb") as file:
            while part := file.read(min(_CHUNK, most + 1 - size)):
                parts.append(part)
                size += len(part)
    except FileNotFoundError as e:
        raise error(f"{path}: no such {what}") from e
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: a `~user` that does not exist
        raise error(f"{path}: the {what} cannot be read ({getattr(e, 'strerror', None) or e})") from e
    if size > most:
        raise error(f"{path}: larger than {size_text(most)}, the most that is read of a {what}")
    data = b"".join(parts)
    if is_lfs_pointer(data):
        raise error(f"{path}: is a git-LFS pointer, not the file itself; run `git lfs pull` in its repository")
    return data


def size_text(count: int) -> str:
    """A number of bytes in words: "64 MiB"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"
