"""`scale-rae demo` as it is started and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scale_rae.cli import main
from tests.cli.test_program import heed_interrupts
from tests.demo.conftest import needs_gradio
from tests.helpers.forked import Forked

pytestmark = needs_gradio
httpx = pytest.importorskip("httpx")  # comes with gradio


@contextlib.contextmanager
def running(environment: dict[str, str], *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program and the address that it prints; the block must end it, without an error."""
    command = [sys.executable, "-m", "scale_rae", "demo", "--device", "cpu", *options]
    program = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        preexec_fn=heed_interrupts,
    )
    try:
        assert program.stdout is not None
        line = program.stdout.readline()
        address = line.split()[0] if line else str(program.communicate(timeout=300))
        assert address.startswith("http://127.0.0.1:")
        yield program, address
        _, errors = program.communicate(timeout=300)
    finally:
        program.kill()
    assert program.returncode == 0
    assert errors == ""


def test_opens_and_ends_with_ctrl_c_leaving_nothing(tmp_path: Path) -> None:
    def run() -> int:
        tempfile.tempdir = str(tmp_path)
        return main(["demo", "--device", "cpu"])

    with (tmp_path / "errors").open("w+") as errors:
        program = Forked(run, errors.fileno())
        try:
            address = program.stdout.readline().split()[0]
            with urllib.request.urlopen(address, timeout=300) as answer:
                text = answer.read().decode()
            assert answer.status == 200
            for other in ("fonts.googleapis.com", "fonts.gstatic.com", "cdnjs", "jsdelivr", "huggingface.co"):
                assert f"//{other}" not in text
            assert list(tmp_path.glob("scale-rae-demo-*"))
            os.kill(program.pid, signal.SIGINT)
            assert program.wait() == 0
        finally:
            if program.returncode is None:
                program.kill()
        errors.seek(0)
        assert errors.read() == ""
    assert not list(tmp_path.glob("scale-rae-demo-*"))


HOSTILE = {
    "ALL_PROXY": "socks://127.0.0.1:1",
    "http_proxy": "http://127.0.0.1:1",
    "SSL_CERT_FILE": "/nonexistent/cert.pem",
    "GRADIO_SERVER_PORT": "abc",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_ROOT_PATH": "http://evil.example",
    "GRADIO_SHARE": "true",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_TEMP_DIR": "/proc/nothing",
    "GRADIO_SSR_MODE": "true",
    "GRADIO_MCP_SERVER": "true",
    "GRADIO_ANALYTICS_ENABLED": "True",
    "GRADIO_NUM_WORKERS": "x",
    "GRADIO_DEFAULT_CONCURRENCY_LIMIT": "x",
    "GRADIO_DEBUG": "x",
    "GRADIO_WATCH_DIRS": "/",
}


def test_the_environment_neither_stops_nor_opens_it_and_sigterm_ends_it_while_it_draws(tmp_path: Path) -> None:
    temporary, output = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    (temporary / "gradio").touch()  # the folder that gradio would have is another user's
    environment = HOSTILE | {"TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    with (
        running(environment, "--output-dir", str(output)) as (program, address),
        httpx.Client(base_url=address, trust_env=False, timeout=300) as http,
    ):
        config = http.get("/config").json()
        assert config["root"] == address
        assert http.get("/gradio_api/file=/etc/hostname").status_code == 404
        listening = {c.laddr.ip for c in psutil.Process(program.pid).net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        (go,) = [c["id"] for c in config["components"] if c["props"].get("elem_id") == "draw-go"]
        function = next(d["id"] for d in config["dependencies"] if [go, "click"] in [list(t) for t in d["targets"]])
        data = ["a red circle", 2, 1.0, 250, "euler", "1", None]
        body = {"data": data, "fn_index": function, "session_hash": "s"}
        assert http.post("/gradio_api/queue/join", json=body).status_code == 200
        with http.stream("GET", "/gradio_api/queue/data?session_hash=s") as stream:
            next(text for text in stream.iter_lines() if "Step" in text)
            program.send_signal(signal.SIGTERM)
            program.wait(timeout=300)  # the page ends while a visitor is connected
    assert [path.name for path in temporary.iterdir()] == ["gradio"]
    assert list(output.iterdir()) == []


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "scale_rae", "demo", "--device", "cpu", "--port", port]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 1
    assert run.stderr == f"error: cannot listen on 127.0.0.1, port {port}; choose another --port\n"
