"""`reproduce` with the bundled model and its judge: whole, and what it refuses before anything is drawn."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from scale_rae.geneval import detector
from scale_rae.geneval.mask2former import convert
from tests.cli.conftest import Cli
from tests.helpers.made_geneval import small_architecture, write_clip, write_detector

PROMPTS = Path(__file__).parents[2] / "example_prompts_shapes.jsonl"


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--prompts: is needed. GenEval's prompts are prompts/evaluation_metadata.jsonl of https://"),
        (["--prompts", "{tmp}/none.jsonl"], "none.jsonl: no such prompt file. GenEval's prompts are"),
        (["--prompts", "{tmp}/bad.jsonl"], "bad.jsonl: line 2: include[0].class is 'dog', which is none of"),
        (["--prompts", "{tmp}/good.jsonl", "--rounds", "3"], "--rounds 3: must be one of 1, 2, 4, 8"),
        (["--prompts", "{tmp}/good.jsonl", "--devices", "cpu", "--device", "cpu"], "--device, --devices: give one"),
        (["--prompts", "{tmp}/good.jsonl", "--steps", "1"], "steps 1: the euler solver"),
    ],
)
def test_refuses_what_cannot_be_reproduced(cli: Cli, tmp_path: Path, arguments: list[str], words: str) -> None:
    good = PROMPTS.read_text().splitlines()[0]
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{good.replace('square', 'dog').replace('0}', '1}')}\n")
    given = [text.replace("{tmp}", str(tmp_path)) for text in arguments]
    assert words in cli("reproduce", "shapes", "--judge", "shapes", *given).error


def test_draws_evaluates_and_makes_a_table_and_goes_on(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    drawn = ("--limit", 1, "--rounds", 2, "--steps", 5)
    arguments = ("reproduce", "shapes", "--judge", "shapes", "--prompts", PROMPTS, *drawn)
    run = cli(*arguments, "--output-dir", out, "--device", "cpu")
    assert run.code == 0, run.err
    assert "1 prompt: 8 images of best-of-n, about 8 of adaptive search" in run.err
    assert "note: 1 prompt, not GenEval's 553: the scores cannot be compared" in run.err
    lines = run.out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["4×1", "4×2", "4×2", "adaptive"]
    assert lines[-2:] == [str(out / "reproduction.html"), str(out / "reproduction.json")]
    record = json.loads((out / "reproduction.json").read_text())
    rows = {(row["policy"], row["metric"]): row for row in record["rows"]}
    assert rows["4×1", None]["images"]["total"] == rows["4×2", "combined"]["images"]["total"] == 4
    assert rows["4×2", "answer_logits"]["paper"] == 59.6
    results = [json.loads(line) for line in next(out.rglob("2_*_shapes/results.jsonl")).read_text().splitlines()]
    first = [r["correct"] for r in results if int(r["filename"][-9:-4]) < 4]
    assert rows["4×1", None]["images"]["right"] == sum(first)
    page = (out / "reproduction.html").read_text()
    assert "GenEval of shapes" in page
    assert "<td>59.6</td>" in page
    shutil.rmtree(next(out.rglob("adaptive_*_shapes")))
    again = cli(*arguments, "--output-dir", out, "--device", "cpu", "--json")
    assert again.code == 0, again.err
    assert json.dumps(json.loads(again.out), ensure_ascii=False) == again.out.strip()  # one line, as everywhere
    assert "1 prompt done already" in again.err
    assert json.loads(again.out) == record


def test_with_a_detector_and_clip(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up ones, of the published structure: what they see is nonsense, but every step is GenEval's."""
    monkeypatch.setattr(detector, "Detector", partial(detector.Detector, scale=(333, 200)))  # quick
    prompt = {"tag": "colors", "include": [{"class": "apple", "count": 1, "color": "red"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt | {"prompt": "a photo of a red circle"}) + "\n")
    convert(write_detector(tmp_path / "small.pth"), tmp_path / "detector", small_architecture())
    judge = ("--detector", tmp_path / "detector", "--clip", write_clip(tmp_path / "clip"))
    drawn = ("--prompts", tmp_path / "prompts.jsonl", "--rounds", 1, "--steps", 2, "--device", "cpu")
    run = cli("reproduce", "shapes", *judge, *drawn, "--threshold", 0.01, "--output-dir", tmp_path / "out")
    assert run.code == 0, run.err
    assert "GenEval's own evaluator" in run.err
    found = {}
    for file in (tmp_path / "out").rglob("*_geneval/results.jsonl"):
        found[file.parent.name.split("_")[0]] = [json.loads(line) for line in file.read_text().splitlines()]
    assert set(found) == {"1", "adaptive"}
    assert len(found["1"]) == 4
    assert len(found["adaptive"]) >= 4
    details = [json.loads(result["details"]) for results in found.values() for result in results]
    assert any(details)  # it found something somewhere
