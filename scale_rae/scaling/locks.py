"""Locks that end with their process: flock's, or those of the library `filelock` on Windows.

A lock of `filelock` is exclusive only, and no child process inherits it. Both kinds lock the open file, not its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def can_share() -> bool:
    """Whether several processes can have one lock: children of one process, or started together."""
    return fcntl is not None


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Whether an open file could be locked: False if another process has the lock.

    It stays locked until it is closed, here and in processes that inherited it.

    Raises:
        OSError: when the file system has no locks.
    """
    if fcntl is None:
        from filelock import lock_descriptor

        assert not shared, "see can_share"
        return lock_descriptor(descriptor, blocking=False)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """For a `with`: waits until no other process is in such a block for `folder`.

    No lock file is left in the folder. Where folders cannot be locked (Windows), a file among the user's temporary files is
    locked instead. On file systems without locks, nothing is waited for.
    """
    try:
        handle = _open_to_lock(folder)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            else:
                from filelock import lock_descriptor

                lock_descriptor(handle)
        yield
    finally:
        os.close(handle)


def _open_to_lock(folder: Path) -> int:
    """A descriptor of the folder, or of a temporary file that stands for it.

    The latter is used where no folder can be opened.
    """
    if fcntl is not None:
        return os.open(folder, os.O_RDONLY)
    name = hashlib.sha256(os.path.normcase(folder.resolve()).encode()).hexdigest()
    return os.open(Path(tempfile.gettempdir()) / f"scale-rae-{name[:32]}.lock", os.O_RDWR | os.O_CREAT, 0o600)
