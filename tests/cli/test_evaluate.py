"""`evaluate geneval` with the judge of shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.helpers.made_experiment import write_experiment


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("evaluated") / "made", prompts=3, n_samples=2, rounds=1)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "made")


def test_says_how_many_are_right_and_writes_results_summary_and_page(cli: Cli, folder: Path) -> None:
    run = cli("evaluate", "geneval", folder, "--judge", "shapes", "--device", "cpu")
    assert run.code == 0, run.err
    lines = run.out.splitlines()
    beside = folder.with_name("made_shapes")
    assert lines[-3:] == [str(beside / name) for name in ("results.jsonl", "results.summary.json", "results.html")]
    results = [json.loads(line) for line in (beside / "results.jsonl").read_text().splitlines()]
    right = sum(r["correct"] for r in results)
    assert 0 < right < len(results) == 6
    assert lines[0].startswith("images:   6, right: ")
    assert lines[0].endswith(f"({right}/6)")
    assert any(line.startswith(f"overall  {right / 6:.5f} [") for line in lines)
    assert any(line.split()[:3] == ["combined", "ranked", "first"] for line in lines)
    assert "6 images judged" in run.err
    page = (beside / "results.html").read_text()
    assert page.count("<figure data-tag") == 6 - right
    assert str(folder.parent) not in page
    again = cli("evaluate", "geneval", folder, "--judge", "shapes", "--json", "--no-page")
    assert again.err == ""
    assert json.loads(again.out) == json.loads((beside / "results.summary.json").read_text())
    assert json.loads(again.out)["images"]["right"] == right


def test_compares_with_another_folder_or_file(cli: Cli, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    for place in other.glob("0*"):  # another order of pictures: no difference
        shutil.move(place / "samples" / "00000.png", place / "x.png")
        shutil.move(place / "samples" / "00001.png", place / "samples" / "00000.png")
        shutil.move(place / "x.png", place / "samples" / "00001.png")
    arguments = ("evaluate", "geneval", folder, "--judge", "shapes", "--no-page", "--json", "--compare")
    found = json.loads(cli(*arguments, other).out)["comparison"]
    assert found["prompts"] == 3
    assert found["differences"]["overall"]["difference"] == 0
    assert json.loads(cli(*arguments, tmp_path / "other_shapes" / "results.jsonl").out)["comparison"] == found
    text = cli("evaluate", "geneval", folder, "--judge", "shapes", "--no-page", "--compare", other).out
    assert "compared on 3 prompts that both have:" in text


def test_what_is_missing_ends_with_status_1(cli: Cli, folder: Path) -> None:
    (folder / "00001" / "metadata.jsonl").write_text('{"tag": "colors"}')
    picture = folder / "00002" / "samples" / "00001.png"
    picture.write_bytes(picture.read_bytes()[:100])
    run = cli("evaluate", "geneval", folder, "--judge", "shapes", "--no-page")
    assert run.code == 1
    lines = [line for line in run.err.splitlines() if line.startswith("not evaluated: ")]
    assert [line.split(": ")[1] for line in lines] == ["00001", "00002/samples/00001.png"]
    assert "2 things could not be evaluated, listed above" in run.err.splitlines()[-1]
    assert "images:   3, right: " in run.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/none"], "none: no such folder"),
        (["{tmp}"], "not an experiment, since it has no folders 00000, 00001, …; did you mean {tmp}/made?"),
        (["{tmp}/made", "--devices", "cpu,"], "--devices 'cpu,': must be device names"),
        (["{tmp}/made", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (
            ["{tmp}/made", "--out", "{tmp}/made/results.jsonl"],
            "is inside the experiment, which is only read; choose another --out",
        ),
        (["{tmp}/made", "--compare", "{tmp}/none"], "none: no such results file"),
        (["{tmp}/made", "--compare", "{tmp}/other"], "other: not an experiment, since it has no folders"),
        (["{tmp}/made", "--threshold", "2"], "threshold 2.0: must be 0 to 1"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, folder: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "other").mkdir()
    given = [text.replace("{tmp}", str(tmp_path)) for text in arguments]
    assert words.replace("{tmp}", str(tmp_path)) in cli("evaluate", "geneval", *given, "--judge", "shapes").error
    assert not folder.with_name("made_shapes").exists()  # it is said before anything is judged


def test_nothing_to_compare_is_said(cli: Cli, folder: Path, tmp_path: Path) -> None:
    result = {
        "filename": "a",
        "tag": "t",
        "prompt": "p",
        "correct": True,
        "reason": "",
        "metadata": "{}",
        "details": "{}",
    }
    (tmp_path / "results.jsonl").write_text(json.dumps(result))
    arguments = (
        "evaluate",
        "geneval",
        folder,
        "--judge",
        "shapes",
        "--no-page",
        "--compare",
        tmp_path / "results.jsonl",
    )
    run = cli(*arguments)
    assert run.code == 1
    assert run.err.splitlines()[-1] == (
        "error: --compare: none of the other's prompts (1) is among these (3); prompts are paired by tag, include, exclude and prompt"
    )
    assert "compared on" not in run.out
    assert "images:   6, right: " in run.out


@pytest.mark.parametrize(
    ("file", "words"), [("none.pth", "no such detector file"), (".", "is a folder, not a detector file")]
)
def test_a_detector_file_that_is_none(cli: Cli, tmp_path: Path, file: str, words: str) -> None:
    assert words in cli("evaluate", "convert-detector", tmp_path / file, tmp_path / "out").error
    (tmp_path / "out").mkdir()
    assert (
        "out: exists; give the name of a new folder"
        in cli("evaluate", "convert-detector", "x.pth", tmp_path / "out").error
    )
