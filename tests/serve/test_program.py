"""`scale-rae serve` as a process: a fork of the test's, which has imported torch already."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from scale_rae.cli import main
from tests.helpers.forked import Forked
from tests.serve.conftest import CIRCLE, ROOT
from tests.serve.test_limits import IMAGES, get, post

SECRET = "s3cret-key"
COMMAND = ["serve", "--model-path", "shapes", "--device", "cpu", "--port", "0"]
COMMAND += ["--batch-size", "1"]  # other sizes are tried for their last digits first, which takes seconds


@contextmanager
def program(log: Path) -> Iterator[tuple[Forked, str]]:
    """The command with the bundled model, ready, and its address; its stderr goes to `log`."""

    def run() -> int:
        logging.getLogger().handlers.clear()  # pytest's
        os.environ["SCALE_RAE_API_KEY"] = SECRET
        return main(COMMAND)

    with log.open("w") as file:
        process = Forked(run, file.fileno())
    try:
        while not (found := re.search(r" on (http://\S+)/v1", log.read_text())):
            assert process.poll() is None
            time.sleep(0.05)
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()


def test_sigterm_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    key = {"Authorization": f"Bearer {SECRET}"}
    with program(tmp_path / "log") as (process, url), ThreadPoolExecutor(4) as pool:
        assert get(url + "/v1/models")[0] == 401
        assert json.loads(get(url + "/v1/models", key)[1])["data"][0]["id"] == "shapes"
        running = pool.submit(post, url + IMAGES, {"prompt": CIRCLE, "steps": 150, "seed": 3}, key)
        while b'batch_size_count{stage="draw"} 1.0' not in get(url + "/metrics", key)[1]:
            time.sleep(0.05)
        waiting = pool.submit(post, url + IMAGES, {"prompt": CIRCLE, "steps": 150}, key)
        while b"requests_waiting 1.0" not in get(url + "/metrics", key)[1]:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert waiting.result()[0] == 503
        assert post(url + IMAGES, {"prompt": CIRCLE}, key)[0] == 503
        status, answer, _ = running.result()
        assert (status, answer["data"][0]["seed"]) == (200, 3)
        assert process.wait() == 0
    log = (tmp_path / "log").read_text()
    assert f"POST {IMAGES} 200" in log
    assert "Traceback" not in log
    for secret in (SECRET, "red circle"):
        assert secret not in log


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    key = {"Authorization": f"Bearer {SECRET}"}
    with program(tmp_path / "log") as (process, url), ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, url + IMAGES, {"prompt": CIRCLE, "steps": 250, "n": 8}, key)
        while b'batch_size_count{stage="draw"} 1.0' not in get(url + "/metrics", key)[1]:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        while get(url + "/ready", key)[0] == 200:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 1
        status, answer, _ = running.result()
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
    log = (tmp_path / "log").read_text()
    assert "stopped before everything was done" in log
    assert "Traceback" not in log


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    assert main(["serve", "--model-path", "shapes"]) == 1
    assert (
        capsys.readouterr().err
        == 'error: scale-rae serve: needs fastapi, which is not installed; pip install "scale-rae[serve]"\n'
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--host", "0.0.0.0"], "lets other machines in"),
        (["--api-key", " "], "API key must be"),
        (["--api-key", "schlüssel"], "API key must be"),
        (["--host", "192.0.2.1", "--api-key", "k"], "cannot listen on 192.0.2.1"),
    ],
)
def test_a_bad_start_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model-path", "shapes", *argv]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_taken_port_and_a_missing_model(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model-path", "shapes", "--port", port]) == 1
        assert f"port {port}" in capsys.readouterr().err
    assert main(["serve", "--model-path", str(tmp_path), "--port", "0", "--device", "cpu"]) == 1
    assert "config.json" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom scale_rae.cli import main\nassert main(['serve', '--help']) == 0\n"
        "assert not {'torch', 'fastapi', 'uvicorn', 'prometheus_client'} & set(sys.modules)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env).stdout
    assert "--api-key" in shown
    assert "SCALE_RAE_API_KEY" in shown


def test_limits_of_the_command_are_those_of_the_package() -> None:
    import inspect

    from scale_rae.cli.serve import command
    from scale_rae.serve.settings import Limits

    default = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    limits = Limits()
    same = {
        "requests": default["max_requests"],
        "deadline": default["deadline"],
        "connections": default["max_connections"],
        "connections_each": default["max_client_connections"],
        "headers": default["header_time"],
        "head": default["max_header"] << 10,
        "body": default["max_body"] << 20,
        "bodies": default["max_bodies"] << 20,
        "upload": default["upload_time"],
        "items": default["max_items"],
        "prompt": default["max_prompt"],
        "pixels": default["max_pixels"],
        "images": default["max_pictures"],
        "decoders": default["decoders"],
        "decoding": default["decode_time"],
        "drawings": default["max_images"],
        "steps": default["max_steps"],
        "new_tokens": default["max_new_tokens"],
    }
    assert {name: getattr(limits, name) for name in same} == same
