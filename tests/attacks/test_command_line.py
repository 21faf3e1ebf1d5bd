"""Against the command line: texts that a terminal would act on, names that cannot be written down, streams that fail, signals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scale_rae import provenance
from scale_rae.cli import app, runs
from scale_rae.cli.options import OutputOptions
from scale_rae.cli.progress import ScalingDisplay
from scale_rae.scaling.events import Message, PromptFailed, PromptFinished
from tests.cli.conftest import DRAW, Cli, cli, left, no_loading

__all__ = ["cli", "no_loading"]  # fixtures

pytestmark = pytest.mark.attack
ROOT = Path(__file__).parents[2]
CLI = [sys.executable, str(ROOT / "cli.py")]
HOSTILE = "\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b[2J\x9b31m\u202e\x00"


def is_harmless(text: str) -> bool:
    return not any(c in text for c in HOSTILE[:1] + "\x07\x9b\u202e\x00\r")


# --- texts that a terminal would act on --------------------------------------------------------------------------


@pytest.mark.usefixtures("no_loading")
def test_what_errors_quote_is_escaped(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_text(json.dumps({"prompt": "a", "index": HOSTILE}))
    (tmp_path / "key.jsonl").write_text('{"prompt": "\x1b[2J"}')
    manifest = {"mode": HOSTILE, "prompt": HOSTILE}
    (tmp_path / "mode.json").write_text(json.dumps(manifest))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": HOSTILE}))
    for argv in (
        ("t2i", "--prompts", tmp_path / "index.jsonl"),
        ("t2i", "--prompts", tmp_path / "key.jsonl"),
        ("t2i", "--from-manifest", tmp_path / "mode.json"),
        ("t2i", "--prompt", DRAW, "--model-path", tmp_path / "model", "--output-dir", tmp_path),
        ("t2i", "--prompt", DRAW, "--model-path", "x" + HOSTILE[:-1], "--output-dir", tmp_path),
    ):
        result = cli(*argv)
        assert result.code == 1
        assert is_harmless(result.error)


def test_a_traceback_is_escaped(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"mode": HOSTILE}))
    result = cli("t2i", "--from-manifest", tmp_path / "m.json", "--debug")
    assert "Traceback" in result.err
    assert is_harmless(result.err)


def test_replies_and_answers_are_escaped_but_for_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    manifest: dict[str, Any] = {
        "output_text": f"one\ntwo\t{HOSTILE}",
        "output_images": [f"/{HOSTILE}.png"],
        "latent_paths": [],
        "post_qa": {"answers": [{"question": HOSTILE, "answer": HOSTILE}]},
    }
    runs.print_results(manifest, OutputOptions(Path("x")))
    text = capsys.readouterr().out
    assert text.startswith("one\ntwo\t\\x1b]0;title\\x07")
    assert is_harmless(text)


def test_json_on_a_terminal_is_harmless_and_means_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    app.show_json({"text": HOSTILE, "é": "猫"})
    text = capsys.readouterr().out
    assert is_harmless(text)
    assert "猫" in text
    assert json.loads(text) == {"text": HOSTILE, "é": "猫"}


def test_progress_of_scaling_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    display = ScalingDisplay()
    display(Message(HOSTILE))
    display(PromptFailed(index=1, error=HOSTILE))
    display(PromptFinished(index=2, prompt=HOSTILE, images=8, yes=5))
    text = capsys.readouterr().err
    assert is_harmless(text)
    assert len(text.splitlines()) == 3


def test_differences_from_a_manifest_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    found = provenance.differences(
        {"model": {"name": "a", "revision": HOSTILE}}, {"model": {"name": "a", "revision": "b"}}
    )
    app.say(f"warning: {found}")
    app.say(found[0])
    assert is_harmless(capsys.readouterr().err)


# --- names that cannot be written down ---------------------------------------------------------------------------

LATIN1 = os.fsdecode(b"caf\xe9")


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    "argv",
    [
        ["img", "--image", LATIN1 + ".png", "--prompt", "What?"],
        ["latent", "--latent", LATIN1 + ".pt", "--action", "decode"],
        ["latent", "--latent", "a.pt", LATIN1 + ".pt", "--action", "decode"],
        ["t2i", "--prompt", DRAW, "--output-dir", LATIN1],
        ["t2i", "--prompt", DRAW, "--model-path", LATIN1],
        ["t2i", "--prompt", DRAW, "--decoder-repo", LATIN1],
        ["t2i", "--prompts", LATIN1 + ".txt"],
        ["t2i", "--from-manifest", LATIN1 + ".json"],
        ["t2i", "--prompt", DRAW, "--post-qa-template-path", LATIN1],
        ["scale", "t2i", "--metadata-file", LATIN1 + ".jsonl"],
        ["scale", "t2i", "--metadata-file", "a.jsonl", "--output-dir", LATIN1],
        ["select", "--sample-dir", LATIN1],
    ],
)
def test_names_that_are_not_utf8(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """Refused though they are there: what they are called could not be recorded, after all the work."""
    monkeypatch.chdir(tmp_path)
    for name in ("", ".png", ".pt", ".txt", ".json", ".jsonl"):
        (tmp_path / (LATIN1 + name)).write_bytes(b"a")
    (tmp_path / "a.pt").write_bytes(b"a")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}')
    result = cli(*argv)
    assert result.code == 1
    assert "recorded" in result.error
    assert "e9" in result.error


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", ["~nosuch/x", "a" * 300, "a/" * 3000])
def test_names_that_no_file_has(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in (
        ["img", "--image", name, "--prompt", "What?"],
        ["latent", "--latent", name, "--action", "decode"],
        ["t2i", "--prompts", name],
        ["t2i", "--from-manifest", name],
        ["t2i", "--prompt", DRAW, "--model-path", name],
        ["t2i", "--prompt", DRAW, "--model-path", "none", "--output-dir", name],
        ["t2i", "--prompt", DRAW, "--post-qa-template-path", name],
    ):
        result = cli(*argv)
        assert result.code == 1
        assert "unexpected" not in result.error
    assert left(tmp_path) == []


# --- streams that fail -------------------------------------------------------------------------------------------


def as_command(body: str) -> list[str]:
    """A program with one command, which does what `body` says."""
    return [
        *(sys.executable, "-c"),
        "import sys, types\nfrom scale_rae.cli import app, main\n"
        f"def command(debug: bool = False) -> None:\n    {body}\n"
        "sys.modules['made_up'] = types.SimpleNamespace(command=command)\n"
        "app.COMMANDS['x'] = ('made_up', 'Draw', 'x')\nsys.exit(main(['x']))",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "command",
    [[*CLI, "--help"], [*CLI, "--version"], as_command("app.show('done')"), as_command("app.show_json({'a': 1})")],
    ids=["help", "version", "text", "json"],
)
def test_a_full_device_as_stdout(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert run.returncode == 1
    assert run.stderr == "error: the standard output cannot be written (No space left on device); send it elsewhere\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8", "utf-16"])
def test_json_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    value = {"prompt": "naïve 猫 🔴 \x85\u2028", "text": '\\ " \n'}
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    app.show_json(value)
    stream.flush()
    monkeypatch.undo()
    assert json.loads(written.getvalue().decode(encoding)) == value
    assert ("猫".encode() in written.getvalue()) == (encoding == "utf-8")


# --- signals -----------------------------------------------------------------------------------------------------

SAVING = """from PIL import Image
    from scale_rae.cli.runs import RunWriter
    from scale_rae.cli.options import OutputOptions
    from scale_rae.outputs import Sample
    from pathlib import Path
    picture = Image.effect_noise((300, 300), 50)
    with RunWriter(OutputOptions(Path(sys.argv[1])), at_once=True) as writer:
        for i in range(100_000):
            writer.save({"output_text": ""}, [Sample(picture)] * 4, f"-{i:05}")"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_signals_while_writing(tmp_path: Path, first: signal.Signals) -> None:
    """One ends the run between two files, and twenty more make no difference."""
    process = subprocess.Popen(
        [*as_command(SAVING), str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(21):
            process.send_signal(first)
            time.sleep(0.002)  # else the system makes one of several
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + first
    assert err == "error: interrupted; nothing is left half-written\n"
    names = left(tmp_path)
    manifests = [name for name in names if name.endswith("_manifest.json")]
    assert manifests
    written = [Path(p).name for m in manifests for p in json.loads((tmp_path / m).read_text())["output_images"]]
    assert sorted([*manifests, *written]) == names


def test_handlers_are_put_back(cli: Cli) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    cli("--version")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
