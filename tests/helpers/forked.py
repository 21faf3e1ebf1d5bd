"""Workers as forks of the test's process, which has imported torch already: a program of its own would take seconds for that.

That the command starts programs is tested where one is killed, and once with two.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from scale_rae.scaling import local, worker_process


class _Fork:
    """What the launcher uses of a `subprocess.Popen` that starts a worker."""

    def __init__(self, command: list[str], *, stderr: Any, env: dict[str, str], **_: Any) -> None:
        assert any("worker_process" in word for word in command)
        assignment, self_in = os.pipe()
        self_out, events = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                for ours, number in ((assignment, 0), (events, 1), (stderr.fileno(), 2)):
                    os.dup2(ours, number)
                os.environ.update(env)
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
                code = worker_process.main()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(assignment)
        os.close(events)
        self.stdin, self.stdout = os.fdopen(self_in, "w"), os.fdopen(self_out)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def fork_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the local launcher fork its workers."""
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=_Fork, PIPE=subprocess.PIPE))
