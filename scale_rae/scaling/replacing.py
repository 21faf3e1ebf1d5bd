"""Folders and files of select, report and sheet are replaced whole.

At any moment the old one or the new one is there. A new folder is built beside its target and takes its place in one step. On
file systems that cannot exchange two names the step is two renames; the next command that reads or writes the folder mends what
a kill left between them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scale_rae.errors import OutputError
from scale_rae.files import check_name, exchange, replace, write_new
from scale_rae.scaling.locks import alone_in


@contextlib.contextmanager
def replaced(targets: Sequence[Path], check: Callable[[Path], None]) -> Iterator[list[Path]]:
    """For a `with`: paths at which to build new folders.

    They replace `targets` when the block ends without an error. The targets lie in one folder, and no other process replaces
    folders there meanwhile. `check` is called with each target before anything is built, and raises an error if it must not be
    replaced.

    Raises:
        OutputError: when a link is in the place of a folder that a killed process could have left.
        OSError: when a folder cannot be moved.
    """
    new = [_new(target) for target in targets]
    with alone_in(targets[0].parent):
        for target in targets:
            _recover(target)
            check(target)
        try:
            yield new
            for target in targets:
                _swap(target)
        finally:
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)


def restored(folder: Path) -> Path:
    """The folder itself.

    If a process was killed while it replaced the folder, the old one is put back first.
    """
    with contextlib.suppress(OSError):
        if not os.path.lexists(folder) and os.path.lexists(_old(folder)):
            with alone_in(folder.parent):  # a process that is alive puts its new folder there by itself
                _recover(folder)
    return folder


def check_outside(path: Path, source: Path, flag: str = "-o") -> None:
    """Raises OutputError for an output file inside the experiment, or where a folder is.

    `flag` is the flag that chooses the file.
    """
    check_name(path, "output file")
    try:
        if source.resolve() in path.resolve().parents:
            raise OutputError(f"{path}: is inside the experiment, which is only read; choose another {flag}")
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; choose another {flag}")
    except OSError as e:
        raise OutputError(f"{short_name(path)}: cannot be written ({e.strerror or e}); choose another {flag}") from e


def write_file(path: Path, data: bytes, source: Path, flag: str = "-o") -> None:
    """Writes a report or sheet, whole or not at all, and never into the experiment that it shows.

    Raises:
        OutputError: naming the file, and the `flag` that chooses it.
    """
    check_outside(path, source, flag)
    target = Path(os.path.abspath(path))  # noqa: PTH100
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_new(staging, data)
            replace(staging, target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"{short_name(path)}: cannot be written ({e.strerror or e}); choose another {flag}") from e


def short_name(path: Path) -> str:
    """A path for a message; the middle of one that is too long for any file system is left out."""
    name = str(path)
    return name if len(name) <= 120 else f"{name[:60]}…{name[-30:]}"


def _new(target: Path) -> Path:
    return target.with_name(f".{target.name}.scale-rae-new")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.scale-rae-old")


def _recover(target: Path) -> None:
    """Undoes what a killed process left half done."""
    for left in (_new(target), _old(target)):
        if left.is_symlink():
            raise OutputError(f"{left}: is a link, which no selection leaves; remove it")
    shutil.rmtree(_new(target), ignore_errors=True)
    if os.path.lexists(_old(target)):
        if os.path.lexists(target):
            shutil.rmtree(_old(target))
        else:
            _old(target).rename(target)


def _swap(target: Path) -> None:
    """Puts the new folder in the place of the old one.

    A kill between the two renames leaves the old folder under its other name, where `_recover` finds it.
    """
    if not os.path.lexists(target):
        _new(target).rename(target)
        return
    if exchange(_new(target), target):
        return  # the old folder now has the new one's name, and is removed under it
    target.rename(_old(target))
    try:
        _new(target).rename(target)
    except OSError:
        _old(target).rename(target)
        raise
    shutil.rmtree(_old(target), ignore_errors=True)
