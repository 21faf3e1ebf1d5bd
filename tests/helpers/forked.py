"""Programs as forks of the test's process, which has imported torch already: a new process would take seconds for that.

That the command starts programs is tested where one is killed, and once with two.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from scale_rae import processes


class Forked:
    """`run` in a fork of this process, which exits with what `run` returns; used as a `subprocess.Popen` with pipes is."""

    def __init__(self, run: Callable[[], int], stderr: int) -> None:
        stdin, self_in = os.pipe()
        self_out, stdout = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                for ours, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
                    os.dup2(ours, number)
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
                code = run()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(stdin)
        os.close(stdout)
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


def in_two_processes(run: Callable[[], object]) -> None:
    """Runs `run` in two forks that are a group, as torchrun's processes are; both must succeed."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": "2"}
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ.update(names | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                run()
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]


def _start_worker(command: list[str], *, stderr: Any, env: dict[str, str], **_: Any) -> Forked:
    """In place of `subprocess.Popen`, for the command of a module."""
    module = importlib.import_module(command[-1])

    def run() -> int:
        os.environ.update(env)
        return int(module.main())

    return Forked(run, stderr.fileno())


def fork_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `processes.start` fork."""
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=_start_worker, PIPE=subprocess.PIPE))
