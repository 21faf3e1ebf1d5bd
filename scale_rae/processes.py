"""Child processes of Python that import this package, and no module that lies in the working folder by chance."""

from __future__ import annotations

import contextlib
import os
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

FOLDER = Path(__file__).parent  # of the package

# `python -m` and `-c` put the working folder before Python's own modules, and PYTHONPATH puts the package's neighbours there.
# So the package alone is loaded from its place; the folder that holds it comes last, for processes that this one starts.
_START = """
import importlib.util, os.path, runpy, sys
spec = importlib.util.spec_from_file_location("scale_rae", sys.argv[1] + "/__init__.py")
sys.modules["scale_rae"] = package = importlib.util.module_from_spec(spec)
sys.path.append(os.path.dirname(sys.argv[1]))
spec.loader.exec_module(package)
module = sys.argv[2]
del sys.argv[1:3]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package, installed or not, in a process of its own."""
    return [sys.executable, "-P", "-c", _START, str(FOLDER), module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment without what puts the working folder on the path of Python processes."""
    values = dict(os.environ)
    values["PYTHONSAFEPATH"] = "1"  # for what they start, too
    # An empty entry is the working folder, and easily made: PYTHONPATH=$PYTHONPATH:/somewhere.
    there = [entry for entry in values.pop("PYTHONPATH", "").split(os.pathsep) if entry and not _is_here(entry)]
    if there:
        values["PYTHONPATH"] = os.pathsep.join(there)
    return values


def start(module: str, log: IO[Any], threads: int, keeps_open: Sequence[int] = ()) -> subprocess.Popen[str]:
    """A process that runs a module of this package, with pipes of text to it and from it; what it prints goes to `log`.

    It has `threads` OpenMP threads, unless OMP_NUM_THREADS says otherwise, and the file descriptors that it `keeps_open`.
    """
    values = environment()
    values["PYTHONUNBUFFERED"] = "1"
    values.setdefault("OMP_NUM_THREADS", str(threads))
    return subprocess.Popen(
        command(module),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=values,
        text=True,
        encoding="utf-8",
        pass_fds=keeps_open,
    )


def send(process: subprocess.Popen[str], line: str) -> None:
    """Writes a line to a process that `start` started; a dead one, which the end of its output shows, does not get it."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.write(line + "\n")
        process.stdin.flush()


def search_folder() -> Path:
    """A folder that a process may search first: the folder that holds the package, or `/`, where no module is.

    It is `/` where the package is installed: packages beside it must not come before Python's own modules.
    """
    installed = {*site.getsitepackages(), site.getusersitepackages()}
    return Path("/") if str(FOLDER.parent) in installed else FOLDER.parent


def _is_here(folder: str) -> bool:
    try:
        return Path(folder).samefile(Path.cwd())
    except OSError:
        return False
