"""`scale-rae demo` as it is started and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.cli.test_program import heed_interrupts

pytest.importorskip("gradio", reason="needs the extra `demo`")


def test_opens_soon_and_ends_with_ctrl_c_leaving_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "scale_rae", "demo", "--device", "cpu"]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_interrupts
    )
    try:
        assert program.stdout is not None
        line = program.stdout.readline()
        address = line.split()[0]
        assert address.startswith("http://127.0.0.1:")
        spent = psutil.Process(program.pid).cpu_times()
        assert spent.user + spent.system < 15  # of the processor's time, which others on it don't change much
        with urllib.request.urlopen(address, timeout=30) as answer:
            text = answer.read().decode()
        assert answer.status == 200
        for other in ("fonts.googleapis.com", "fonts.gstatic.com", "cdnjs", "jsdelivr", "huggingface.co"):
            assert f"//{other}" not in text
        assert list(tmp_path.glob("scale-rae-demo-*"))
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == 0
    assert errors == ""
    assert not list(tmp_path.glob("scale-rae-demo-*"))


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "scale_rae", "demo", "--device", "cpu", "--port", port]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert run.stderr == f"error: cannot listen on 127.0.0.1, port {port}; choose another --port\n"
