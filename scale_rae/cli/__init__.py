"""The command line: `scale-rae …`, or `python cli.py …` in a checkout.

Nothing heavy is imported until a command needs it, so that --help is quick. This file imports only Python's own modules,
so that it can report a missing package.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

OLDEST_PYTHON = (3, 11)
PATIENCE = 5.0  # seconds that cleaning up may take before another Ctrl-C ends the process at once


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code.

    0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted by Ctrl-C, 143 by SIGTERM.
    """
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        print(f"error: Python {sys.version.split()[0]} is too old; scale-rae needs {wanted} or newer", file=sys.stderr)
        return 1
    with _Interruption() as interruption:
        try:
            from scale_rae.cli.app import run

            code = run(argv)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        except ModuleNotFoundError as e:
            from scale_rae.errors import missing_package

            print(f"error: {missing_package(e)}", file=sys.stderr)
            code = 1
    return 128 + interruption.number if code and interruption.number else code


class _Interruption:
    """While entered, the first Ctrl-C or SIGTERM raises KeyboardInterrupt.

    Later signals are ignored for PATIENCE seconds, so that they do not cut cleaning up short; after that, one ends the
    process at once. When the context ends after an interruption, both signals stay ignored, until the process ends.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Shells start background jobs with ignored signals, which stay ignored; None is a handler outside Python.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            # At its end Python resets handlers, but leaves ignored signals ignored.
            signal.signal(number, signal.SIG_IGN if self.number else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._since > PATIENCE:  # a library may be waiting for threads that download
            os._exit(128 + number)
