"""The command line as a program: help, its two names, terminals, interruption."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from scale_rae import __version__, errors, options
from scale_rae.cli import app
from scale_rae.training.distill_settings import DistillOptions
from scale_rae.training.settings import TrainingOptions
from tests.cli.conftest import DRAW, Cli, left

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, str(ROOT / "cli.py")]


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


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_flag_has_a_help_text(name: str) -> None:
    command = app.load_command(name)
    options = [o for c in (command, *getattr(command, "commands", {}).values()) for o in c.params]
    assert [o.name for o in options if o.param_type_name == "option" and not o.help] == []


def test_what_can_be_known_without_torch_is_said_without_it(tmp_path: Path) -> None:
    """Options, files, folders, models that are not there, hubs that do not answer; which takes a fraction of a second."""
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "bad.json").write_text('{"mode": "t2i", "image_seeds": [1], "seed": 1, "guidance_level": 1e999}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    Image.new("RGB", (2, 2)).save(tmp_path / "good.png")
    (tmp_path / "some.pt").write_bytes(b"x")
    draw = ["t2i", "--prompt", "a cat"]
    cases = [
        [*draw, "--guidance-level", "-1", "--model-path", "shapes"],
        [*draw, "--steps", "0", "--model-path", "shapes"],
        [*draw, "--device", "toaster", "--model-path", "shapes"],
        [*draw, "--dtype", "int4", "--model-path", "shapes"],
        [*draw, "--prompt", "a dog"],
        [*draw, "--model-path", "nope"],
        [*draw, "--model-path", "folder"],
        [*draw, "--model-path", "model"],
        draw,  # the guide's first command without a network
        [*draw, "--output-dir", "bad.txt"],
        ["t2i", "--prompts", "bad.txt", "--model-path", "shapes"],
        ["t2i", "--prompts", "none.txt", "--model-path", "shapes"],
        ["t2i", "--from-manifest", "bad.json", "--model-path", "shapes"],
        ["img", "--image", "none.png", "--prompt", "What?", "--model-path", "shapes"],
        ["img", "--image", "bad.txt", "--prompt", "What?", "--model-path", "shapes"],
        ["img", "--image", "good.png", "--prompt", "What?", "--model-path", "nope"],
        ["latent", "--latent", "none.pt", "--action", "decode", "--model-path", "shapes"],
        ["latent", "--latent", "some.pt", "--action", "decode", "--model-path", "nope"],
        ["scale", "t2i", "--metadata-file", "none.jsonl", "--model-path", "shapes"],
        ["evaluate", "geneval", "folder", "--judge", "shapes"],
        ["evaluate", "geneval", "folder", "--detector", "some.pt"],
        ["evaluate", "geneval", "folder"],
        ["reproduce", "shapes", "--judge", "shapes", "--prompts", "none.jsonl"],
    ]
    script = (
        "import json, sys; from scale_rae.cli import main\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    assert main(argv) in (1, 2), argv\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, (argv, heavy)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(cases)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "unexpected" not in run.stderr


@pytest.mark.parametrize(
    "command",
    [["cli.py", "t2i"], ["scaling_experiment.py"], ["verify_results.py"], ["-m", "scale_rae.shapes.evaluate", "read"]],
    ids=" ".join,
)
def test_a_python_without_our_packages(command: list[str]) -> None:
    """As `python3 cli.py` in a new shell after `make demo`."""
    run = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: the package ")
    assert f"is not installed for {sys.executable}; " in run.stderr
    assert run.stdout == ""


def test_what_to_do_about_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModuleNotFoundError("No module named 'a.b'", name="a.b")
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "scale_rae" / "errors.py"))
    assert errors.missing_package(error).endswith("; pip install scale-rae")
    (tmp_path / "Makefile").touch()
    assert "run `make demo`" in errors.missing_package(error)
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "activate").touch()
    assert f"source {scripts / 'activate'}" in errors.missing_package(error)
    assert str(scripts / "scale-rae") in errors.missing_package(error)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert "run `make demo`" in errors.missing_package(error)


def test_a_missing_package_that_a_library_hides_is_named() -> None:
    hidden = ModuleNotFoundError("Could not import module 'Model'. Are its requirements defined correctly?")
    hidden.__cause__ = ModuleNotFoundError("No module named 'psutil'", name="psutil")
    assert errors.missing_package(hidden).startswith("the package psutil is not installed for ")


def test_a_package_that_is_missing_later(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*args: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("scale_rae.hub.find", find)
    assert cli("t2i", "--prompt", DRAW).error.startswith("the package torch is not installed for ")


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--prompt", "a", "--prompt", "b"], 2),
        (["--prompt", "a", "--prompt=b", "--prompt", "a"], 3),
        (["--prompt", "a", "--model-path", "x", "--model_path", "shapes"], 2),
        (["--prompt", "a", "--guidance-interval", "0", "1", "--guidance-interval", "0", "0.5"], 2),
    ],
)
def test_an_option_given_twice(cli: Cli, options: list[str], count: int) -> None:
    """Where the last would be taken without a word."""
    result = cli("t2i", *options)
    assert result.code == 2
    assert f"is given {count} times; it takes one value" in " ".join(result.err.replace("│", " ").split())


def test_flags_and_lists_may_be_given_twice(cli: Cli, tmp_path: Path) -> None:
    lists = ("--latent", tmp_path / "a.pt", "--latent", tmp_path / "b.pt")
    assert "a.pt: no such latent file" in cli("latent", "--json", *lists, "--json", "--action", "decode").error
    assert cli("img", "--draw", "--no-draw", "--image", "x", "--prompt", "y").code == 2


def test_two_names_of_one_program() -> None:
    installed = Path(sys.executable).parent / "scale-rae"
    texts = [
        subprocess.run([*command, "t2i", "--help"], check=True, capture_output=True, text=True, cwd=ROOT).stdout
        for command in (CLI, [str(installed)])
    ]
    assert texts[0].replace("cli.py t2i", "scale-rae t2i").split() == texts[1].split()


def test_the_module_names_itself_as_it_is_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scale_rae" / "__main__.py"), "--help"])
    assert app.run() == 0
    assert "Usage: python -m scale_rae [OPTIONS] COMMAND" in capsys.readouterr().out


def test_commands_of_a_kind_stand_together() -> None:
    headings = [heading for _, heading, _ in app.COMMANDS.values()]
    assert headings == sorted(headings, key=list(dict.fromkeys(headings)).index)
    train, distill = (
        list(dict.fromkeys(option.knob.panel for option in options.options_of(kind)))
        for kind in (TrainingOptions, DistillOptions)
    )
    assert [panel for panel in train if panel in distill] == [panel for panel in distill if panel in train]


def test_every_command_and_flag_is_listed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = cli("--help")
    assert listing.code == 0
    for name, (_, _, summary) in app.COMMANDS.items():
        assert name in listing.out
        assert summary in " ".join(listing.out.replace("│", " ").split())
    flags = "prompt prompts from-manifest model-path decoder-repo output-dir guidance-level seed save-latent num-images"
    flags += " steps solver device dtype guidance-interval max-new-tokens max-new-tokens-qa skip-decoder post-qa-prompt"
    flags += " post-qa-template-path post-qa-mode json debug revision batch-size force"
    text = cli("t2i", "--help").out
    assert [f for f in flags.split() if f"--{f} " not in text] == []
    for default in (options.DEFAULT_MODEL, "nyu-visionx/siglip2_decoder", "nyu-visionx/webssl300m_decoder"):
        assert default in text  # unbroken, at 80 columns
    for name, more in (
        ("img", "--image --draw --no-draw"),
        ("latent", "--action --latent --prompt --max-new-tokens-qa"),
    ):
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
