"""GenEval's judge in a whole evaluation, with made-up checkpoints of detector and CLIP; what verdicts depend on."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scale_rae.errors import OptionError
from scale_rae.geneval.detector import Detector
from scale_rae.geneval.evaluation import beside
from scale_rae.geneval.journal import read_journal
from scale_rae.geneval.judges import JudgeChoice, identity_of, open_judge
from scale_rae.geneval.mask2former import PUBLISHED, convert
from scale_rae.geneval.published import DETECTOR_SHA256
from scale_rae.geneval.results import Result, default_out, read_results
from scale_rae.geneval.verdicts import VerdictOptions
from tests.cli.conftest import Cli
from tests.cli.conftest import cli as cli
from tests.geneval.test_detector import SCALE, picture
from tests.helpers.made_geneval import small_architecture, write_clip, write_detector


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clip, small.pth, and detector, which is converted from it."""
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    convert(write_detector(folder / "small.pth"), folder / "detector", small_architecture())
    return folder


def test_a_whole_evaluation(models: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Detector.__init__, "__defaults__", (None, "float32", PUBLISHED, SCALE))  # small pictures
    detector = Detector(str(models / "detector"), "cpu")
    found = [detector.detect([picture(name)])[0] for name in "ab"]
    seen = [max(one.boxes, key=lambda name, one=one: float(one.boxes[name][:, 4].max())) for one in found]
    folder = tmp_path / "pictures"
    for number, (name, counts) in enumerate(zip("ab", ((1, 2), (1, 1)), strict=True)):
        samples = folder / f"{number:05}" / "samples"
        samples.mkdir(parents=True)
        picture(name).save(samples / "0000.png")
        include = [{"class": seen[number], "count": counts[0]}]
        exclude = [{"class": seen[number], "count": counts[1]}]
        metadata = {"tag": "counting", "include": include, "exclude": exclude, "prompt": f"picture {name}"}
        (folder / f"{number:05}" / "metadata.jsonl").write_text(json.dumps(metadata))
    least = max(float(np.sort(one.boxes[name][:, 4])[-2:].min()) for one, name in zip(found, seen, strict=True))
    thresholds = ("--threshold", least * 0.5, "--counting-threshold", least)
    run = cli(
        *("evaluate", "geneval", folder, "--detector", models / "detector", "--clip", models / "clip"),
        *("--device", "cpu", *thresholds),
    )
    assert run.code == 0, run.err
    assert "note: not comparable with published scores" in run.err
    results: list[Result] = read_results(default_out(folder, "geneval"))
    assert [r.filename for r in results] == ["00000/samples/0000.png", "00001/samples/0000.png"]
    assert results[1].reason == f"expected {seen[1]}<1, found {len(json.loads(results[1].details)[seen[1]])}"
    marks = read_journal(beside(default_out(folder, "geneval"), "journal.jsonl"))[results[1].filename].marks
    best = max(marks, key=lambda mark: mark.score if mark.name == seen[1] else 0)
    row = int(found[1].boxes[seen[1]][:, 4].argmax())
    assert best.box == found[1].boxes[seen[1]][row, :4].tolist()
    assert best.mask is not None
    stored = Image.open(io.BytesIO(base64.b64decode(best.mask)))
    whole = Image.fromarray(found[1].masks[seen[1]][row])
    assert max(stored.size) == min(160, max(whole.size))
    assert abs(np.asarray(stored).mean() - np.asarray(whole).mean()) < 0.02
    assert "<rect " in beside(default_out(folder, "geneval"), "html").read_text()


def test_colours_are_those_of_the_classifier(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Detector.__init__, "__defaults__", (None, "float32", PUBLISHED, SCALE))
    options = VerdictOptions(threshold=0.0)
    judge = open_judge(
        JudgeChoice(detector=str(models / "detector"), clip=str(models / "clip"), options=options), "cpu"
    )
    monkeypatch.setattr(
        "scale_rae.geneval.colors.ColorClassifier.classify", lambda self, crops, names: ["pink"] * len(crops)
    )
    image = picture("a")
    found = Detector(str(models / "detector"), "cpu").detect([image])[0]
    name = next(iter(found.boxes))
    metadata = {"tag": "colors", "include": [{"class": name, "count": 1, "color": "red"}]}
    (judged,) = judge.judge([image], [metadata])
    assert judged.reason == f"expected red {name}>=1, found 0 red; and 1 pink"
    tinted = [mark for mark in judged.marks if mark.color is not None]
    assert [(mark.name, mark.color) for mark in tinted] == [(name, "pink")]
    assert judged.size == list(image.size)


def test_a_picture_that_no_detector_takes_is_a_problem_of_its_own(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Detector.__init__, "__defaults__", (None, "float32", PUBLISHED, SCALE))
    judge = open_judge(JudgeChoice(detector=str(models / "detector"), clip=str(models / "clip")), "cpu")
    metadata = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    narrow = Image.new("RGB", (1, 3000))
    first, second, third = judge.judge([narrow, picture("a"), narrow], [metadata] * 3)
    assert first.problem == third.problem == "1 x 3000 pixels: too narrow for its length"
    assert second.problem is None
    assert second.size == list(picture("a").size)
    assert judge.judge([narrow], [metadata]) == [first]


def test_what_verdicts_depend_on(models: Path) -> None:
    file = JudgeChoice(detector=str(models / "small.pth"), clip=str(models / "clip"))
    folder = JudgeChoice(detector=str(models / "detector"), clip=str(models / "clip"))
    record = identity_of(file)
    assert record == identity_of(folder)  # the folder is converted from the file
    assert record["comparable"] is False
    assert record["clip"] == "clip"
    assert len(record["clip_sha256"]) == len(record["detector_sha256"]) == len(DETECTOR_SHA256)
    config = models / "detector" / "config.json"
    before = config.read_text()
    config.write_text(before.replace(record["detector_sha256"], DETECTOR_SHA256))
    assert identity_of(folder)["comparable"] is True
    assert identity_of(dataclasses.replace(folder, options=VerdictOptions(threshold=0.5)))["comparable"] is False
    assert identity_of(dataclasses.replace(folder, detector_dtype="bfloat16"))["comparable"] is False
    config.write_text(before)


def test_options_that_a_judge_does_not_have() -> None:
    with pytest.raises(OptionError, match=r"--detector: is needed: the file mask2former_swin-s.*743b7d99.pth"):
        JudgeChoice().check()
    with pytest.raises(OptionError, match="--clip: --judge shapes has no such option"):
        JudgeChoice("shapes", clip="x").check()
    with pytest.raises(OptionError, match="--threshold: --judge shapes has no such option"):
        JudgeChoice("shapes", options=VerdictOptions(threshold=0.5)).check()
    JudgeChoice("shapes").check()
