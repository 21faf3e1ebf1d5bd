"""Experiments that somebody else made: read with bounds, shown without what they would have the reader's machine do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scale_rae.cli import main
from scale_rae.scaling.reader import read_experiment
from tests.helpers.made_experiment import write_experiment
from tests.scaling.test_report import Page

pytestmark = pytest.mark.attack
TITLE = "\x1b]0;owned\x07"  # sets a terminal's title
CLIPBOARD = "\x1b]52;c;b3duZWQ=\x07"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return write_experiment(tmp_path / "e", 2, 2, 1)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def gigantic(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: takes no room


@pytest.mark.parametrize("name", ["metadata.jsonl", "error.json", "samples/00001.png"])
@pytest.mark.parametrize("put", [fifo, zeros, gigantic])
def test_a_prompt_with_an_endless_file_is_set_apart(experiment: Path, name: str, put: Callable[[Path], Any]) -> None:
    path = experiment / "00001" / name
    path.unlink(missing_ok=True)
    if name == "error.json":  # beside a result it would not be read
        (experiment / "00001" / "metadata.jsonl").unlink()
    put(path)
    found = read_experiment(experiment)
    assert [p.name for p in found.prompts] == ["00000"]
    assert [p.folder.name for p in found.incomplete] == ["00001"]


@pytest.mark.parametrize("put", [fifo, zeros, gigantic])
def test_an_endless_description_is_one_clear_line(
    experiment: Path, put: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (experiment / "experiment.json").unlink()
    put(experiment / "experiment.json")
    for command in ("select", "report", "sheet"):
        assert main([command, str(experiment)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"error: {experiment}/experiment.json: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["select", "report", "sheet"])
def test_no_control_sequence_reaches_the_terminal(
    experiment: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = experiment / "00000" / "metadata.jsonl"
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | {"prompt": f"a {TITLE}cat\x9b2J\u202e{CLIPBOARD}"}))
    (experiment / "00001" / "metadata.jsonl").unlink()
    (experiment / "00001" / "error.json").write_text(json.dumps({"error": f"no {TITLE} {CLIPBOARD}\x9b2J"}))
    hostile = experiment.rename(experiment.with_name(f"e{TITLE}"))
    assert main([command, str(hostile)]) == 0
    out, err = capsys.readouterr()
    assert "00001" in err
    shown = out + err
    assert not {c for c in shown if c != "\n" and not c.isprintable()}


def test_nothing_in_an_experiment_is_a_tag(experiment: Path, tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}</style></title>"
    file = experiment / "00000" / "metadata.jsonl"
    value = json.loads(file.read_text())
    for entry in value["text_responses"].values():
        entry["reply"] = entry["question"] = evil
    file.write_text(json.dumps(value | {"prompt": evil, "image_seeds": [evil, {evil: [evil]}], "reward": evil}))
    (experiment / "00001" / "metadata.jsonl").unlink()
    (experiment / "00001" / "error.json").write_text(json.dumps({"error": evil, "prompt": evil}))
    (experiment / "experiment.json").write_text(json.dumps({"settings": {"n_samples": 1, "question": evil}}))
    hostile = experiment.rename(tmp_path / evil.replace("/", ""))
    assert main(["report", str(hostile), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 2
    assert len(page.all("style")) == 1
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.headings[0] == f"00000{evil}"
    assert "{{ 7*7 }}" in text


@pytest.mark.parametrize("name", ["~nosuch/x", "x" * 300, "a/" * 3000 + "a", os.fsdecode(b"caf\xe9"), "\x1b[2Jx"])
@pytest.mark.parametrize("command", ["select", "report", "sheet"])
def test_impossible_names_are_one_clear_line(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, name]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "unexpected" not in err
    assert "\x1b" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, os.fsdecode(b"caf\xe9.html")])
@pytest.mark.parametrize("command", ["report", "sheet"])
def test_impossible_output_names_too(
    experiment: Path, command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(experiment), "-o", str(tmp_path / name)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "unexpected" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_selection_writes_through_no_link(experiment: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    for name in (".e_ref.scale-rae-new", ".e_ref.scale-rae-old", "e_ref"):
        (tmp_path / name).symlink_to(elsewhere)
        assert main(["select", str(experiment)]) == 1
        (tmp_path / name).unlink()
    assert [p.name for p in elsewhere.iterdir()] == ["mine"]
