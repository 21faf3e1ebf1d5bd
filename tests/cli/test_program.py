"""The command line as a program: help, its two names, terminals, interruption."""

from __future__ import annotations

import os
import pty
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from scale_rae import __version__
from scale_rae.cli import app, options
from tests.cli.conftest import DRAW, Cli, left

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, str(ROOT / "cli.py")]


def seconds(*command: str) -> float:
    """The processor's time for a command, which does not grow while other tests run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_quick() -> None:
    bare = min(seconds(sys.executable, "-c", "pass") for _ in range(3))
    for argv in (["--help"], ["t2i", "--help"]):
        assert min(seconds(*CLI, *argv) for _ in range(3)) - bare < 0.6


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from scale_rae.cli import main\n"
        "assert main(['--help']) == 0\n"
        "assert not [m for m in sys.modules if m in ('scale_rae.cli.t2i', 'scale_rae.cli.img', 'scale_rae.cli.latent')]\n"
        "for name in ('t2i', 'img', 'latent'): assert main([name, '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_two_names_of_one_program() -> None:
    installed = Path(sys.executable).parent / "scale-rae"
    texts = [
        subprocess.run([*command, "t2i", "--help"], check=True, capture_output=True, text=True, cwd=ROOT).stdout
        for command in (CLI, [str(installed)])
    ]
    assert texts[0].replace("cli.py t2i", "scale-rae t2i").split() == texts[1].split()


def test_every_command_and_flag_is_listed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = cli("--help")
    assert listing.code == 0
    for name, (_, summary) in app.COMMANDS.items():
        assert name in listing.out
        assert summary in " ".join(listing.out.replace("│", " ").split())
    flags = "prompt prompts from-manifest model-path decoder-repo output-dir guidance-level seed save-latent num-images"
    flags += " steps solver device dtype guidance-interval max-new-tokens max-new-tokens-qa skip-decoder post-qa-prompt"
    flags += " post-qa-template-path post-qa-mode json debug revision batch-size force"
    text = cli("t2i", "--help").out
    assert [f for f in flags.split() if f"--{f} " not in text] == []
    for default in (options.DEFAULT_MODEL, "nyu-visionx/siglip2_decoder", "nyu-visionx/webssl300m_decoder"):
        assert default in text  # unbroken, at 80 columns
    for name, more in (("img", "--image"), ("latent", "--action --latent --prompt --max-new-tokens-qa")):
        text = cli(name, "--help").out
        assert all(flag + " " in text for flag in more.split())
    assert cli("--version").out == f"scale-rae {__version__}\n"


def test_wrong_usage_of_the_program(cli: Cli) -> None:
    assert cli("paint").code == 2
    assert cli("--nonsense").code == 2
    nothing = cli()
    assert "Usage:" in nothing.out + nothing.err


def heed_interrupts() -> None:
    """Undoes what a shell does to commands it runs in the background, and their children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_on_a_terminal(checkpoints: dict[str, Path], out: Path) -> None:
    terminal, child_end = pty.openpty()
    process = subprocess.Popen(
        [
            *(*CLI, "t2i", "--model-path", checkpoints["siglip"], "--prompt", DRAW, "--output-dir", out),
            *("--steps", "1000", "--num-images", "8"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=child_end,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "100"},
        preexec_fn=heed_interrupts,
    )
    os.close(child_end)
    stop = threading.Timer(120, process.kill)
    stop.start()
    shown = b""
    try:
        while b"drawing" not in shown:
            assert select.select([terminal], [], [], 100)[0]
            shown += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # the child's end is closed
                break
            if not piece:
                break
            shown += piece
        printed, _ = process.communicate()
    finally:
        stop.cancel()
        process.kill()
        os.close(terminal)
    assert process.returncode == 130
    assert printed == b""
    assert b"drawing 8 images" in shown
    assert shown.endswith(b"interrupted; nothing is left half-written\r\n")
    assert b"Traceback" not in shown
    assert left(out) == []


def test_a_reader_that_goes_away(checkpoints: dict[str, Path], out: Path) -> None:
    """As in `scale-rae … | true`: no traceback."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [*CLI, "latent", "--help"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert "Traceback" not in process.stderr
