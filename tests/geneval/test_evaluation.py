"""Folders in GenEval's layout, from reading to results: what is missing, going on after a kill, policies, several processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scale_rae.errors import DeviceError, InputError, OutputError
from scale_rae.geneval.evaluation import Batch, Evaluation, Task, evaluate, judged_here, open_folder
from scale_rae.geneval.journal import Journal, Judged, Key, Mark
from scale_rae.geneval.judges import JudgeChoice, ShapesJudge, identity_of
from scale_rae.geneval.policies import policies, ranked
from scale_rae.geneval.results import beside, default_out, read_results
from scale_rae.geneval.workers import judging_on
from scale_rae.scaling.reader import read_object
from tests.helpers.forked import fork_workers
from tests.helpers.made_experiment import write_experiment

SHAPES = JudgeChoice("shapes")


class ByColour:
    """A judge that finds a picture right if its top left pixel is bright; counts what it is asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def judge(self, images: Sequence[Image.Image], metadata: Sequence[Any]) -> list[Judged]:
        self.batches.append(len(images))
        return [Judged(correct=image.getpixel((0, 0))[0] > 100, reason="dark") for image in images]


def run(folder: Path, judge: ByColour, out: Path | None = None, most: int | None = None, size: int = 3) -> Evaluation:
    """An evaluation by `judge`, killed after `most` batches."""

    def judging(batches: Sequence[Batch]) -> Iterator[tuple[int, list[Judged]]]:
        for number, judged in reversed(list(enumerate(judged_here(judge, batches)))):
            yield number, judged
            if most is not None and len(batches) - number >= most:
                raise KeyboardInterrupt

    return evaluate(open_folder(folder, SHAPES), SHAPES, {"judge": "by colour"}, judging, size, out)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_experiment(tmp_path / "made", prompts=4, n_samples=2)


def test_goes_on_after_a_kill_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    judge = ByColour()
    whole = run(folder, judge, tmp_path / "whole.jsonl")
    assert judge.batches == [3, 3, 3, 3, 3, 1]
    assert [r.filename for r in whole.results][:5] == [f"00000/samples/{i:05}.png" for i in range(4)] + [
        "00001/samples/00000.png"
    ]
    part = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(folder, ByColour(), part, most=2)
    assert not part.exists()
    journal = beside(part, "journal.jsonl")
    journal.write_bytes(journal.read_bytes()[:-7])  # as a kill in the middle of a line leaves it
    again = ByColour()
    assert run(folder, again, part).new == 15  # all but the last batch of 1: of the other, a line is cut off
    assert part.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    last = ByColour()
    assert run(folder, last, part).new == 0
    assert last.batches == []


def test_a_changed_picture_or_prompt_is_judged_again(folder: Path) -> None:
    first = run(folder, ByColour())
    assert first.out == default_out(folder, "shapes")
    Image.new("RGB", (64, 64), "black").save(folder / "00000" / "samples" / "00000.png")
    record = json.loads((folder / "00003" / "metadata.jsonl").read_text())
    record["include"][0]["count"] = 2
    (folder / "00003" / "metadata.jsonl").write_text(json.dumps(record))
    second = run(folder, ByColour())
    assert second.new == 3 + 3 + 1  # the first batch, and the last two
    assert not second.results[0].correct


def test_what_cannot_be_evaluated_is_listed_and_the_rest_is_evaluated(folder: Path) -> None:
    samples = folder / "00000" / "samples"
    whole = (samples / "00001.png").read_bytes()
    (samples / "00001.png").write_bytes(whole[: len(whole) // 2])
    (samples / "00003.png").unlink()
    (samples / "notes.txt").write_text("not a picture")
    metadata = {"tag": "colors", "prompt": "a cat"}
    (folder / "00001" / "metadata.jsonl").write_text(json.dumps(metadata))
    metadata["include"] = [{"class": "cat", "count": 1}]
    (folder / "00002" / "metadata.jsonl").write_text(json.dumps(metadata))
    Image.new("RGB", (64, 32)).save(folder / "00003" / "samples" / "00000.png")
    choice, judge = SHAPES, ShapesJudge()
    found = evaluate(
        open_folder(folder, choice), choice, identity_of(choice), lambda b: enumerate(judged_here(judge, b)), 4
    )
    texts = [str(item) for item in found.missing]
    assert texts[0] == "00000/samples: lacks 00003.png of 4 pictures"
    assert texts[1].startswith("00001: metadata.jsonl: ")
    assert "include" in texts[1]
    assert texts[2].startswith("00002: metadata.jsonl: include[0].class is 'cat'")
    assert texts[3].startswith("00000/samples/00001.png: the image is damaged")
    assert texts[4] == "00003/samples/00000.png: expected a square picture of at least 64 px, got 64 x 32"
    assert len(texts) == 5
    assert found.missing_images == 1 + 4 + 4 + 1 + 1
    assert [r.filename[:5] for r in found.results] == ["00000"] * 2 + ["00003"] * 3
    assert read_results(found.out) == found.results


def test_what_cannot_be_read_is_not_taken_for_absent(folder: Path) -> None:
    """Links to themselves, since permissions do not bind everybody."""
    shutil.rmtree(folder / "00001" / "samples")
    (folder / "00001" / "samples").symlink_to("samples")
    texts = [str(item) for item in open_folder(folder, SHAPES).missing]
    assert texts == [f"00001: samples: cannot be read ({os.strerror(errno.ELOOP)})"]
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="the metadata cannot be read"):
        read_object(folder / "loop" / "metadata.jsonl", "metadata")
    with pytest.raises(FileNotFoundError):
        read_object(folder / "none" / "metadata.jsonl", "metadata")


def test_a_folder_that_is_none(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="no such folder; give one with pictures in GenEval's layout"):
        open_folder(tmp_path / "none", SHAPES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not an experiment, since it has no folders 00000"):
        open_folder(tmp_path / "empty", SHAPES)
    for place in folder.glob("0*"):
        (place / "metadata.jsonl").write_text("{}")
    with pytest.raises(
        InputError, match=r"no prompt can be evaluated; 00000: metadata.jsonl: tag is None.*, and 3 more"
    ):
        open_folder(folder, SHAPES)


def test_a_journal_is_one_judges_and_one_processes(tmp_path: Path) -> None:
    path, key = tmp_path / "journal.jsonl", Key("a", "b", "c")
    judged = Judged(
        False, "why", {"dog": [[0.0, 1.0, 2.0, 3.0, 0.5]]}, [Mark("dog", [0.0, 1.0, 2.0, 3.0], 0.5, "red")], [4, 4]
    )
    with Journal(path, {"judge": "one", "n": 1}) as journal:
        journal.add([(key, judged)])
        with pytest.raises(OutputError, match="another evaluation writes to it"):
            Journal(path, {"judge": "one", "n": 1})
    with Journal(path, {"judge": "one", "n": 1}) as journal:
        assert journal.judged == {key: judged}
    with pytest.raises(InputError, match="verdicts of another judge: n 2 here, 1 there; choose another --out"):
        Journal(path, {"judge": "one", "n": 2})
    path.write_text("hello\n")
    with pytest.raises(InputError, match="is not a journal"):
        Journal(path, {"judge": "one"})


@pytest.mark.parametrize(
    "left", ['{"judge": {"judge": "two"}}\n', '{"judge": {"jud', '{"judge": {"judge": "two"}}\n{"key": {"na']
)
def test_a_journal_without_verdicts_binds_nobody(tmp_path: Path, left: str) -> None:
    """It is left by a judge that could not be loaded, or by a kill at the beginning."""
    path, key, judged = tmp_path / "journal.jsonl", Key("a", "b", "c"), Judged(True)
    path.write_text(left)
    with Journal(path, {"judge": "one"}) as journal:
        journal.add([(key, judged)])
    assert path.read_text().startswith('{"judge": {"judge": "one"}}\n')
    with Journal(path, {"judge": "one"}) as journal:
        assert journal.judged == {key: judged}
    with pytest.raises(InputError, match="holds verdicts of another judge"):
        Journal(path, {"judge": "two"})


def test_policies_go_by_the_stored_scores(folder: Path) -> None:
    """A judge that agrees with the reward on the sign: what is ranked first by the reward is right wherever any is."""
    read = open_folder(folder, SHAPES)
    found = run(folder, ByColour())
    right = {
        f"{p.name}/samples/{i:05}.png": reward > 0
        for p in read.prompts
        for i, reward in enumerate(p.record["all_ir_scores"])
    }
    results = {n: r.__class__(**{**vars(r), "correct": right[n]}) for n, r in found.by_name.items()}
    rows, unusable = policies(read.prompts, results)
    by_name = {(row.name, row.pictures): row.summary for row in rows}
    assert by_name["all", "all drawn"].images.total == 16
    assert by_name["first", "first 2 drawn"].images.total == 8
    best = by_name["image_reward", "ranked first"]
    assert best.images.right == by_name["all", "all drawn"].prompts.right
    assert by_name["image_reward", "2 kept"].images.total == 8
    assert unusable == {}
    first = read.prompts[0]
    rewards = first.record["all_ir_scores"]
    assert ranked(first, "image_reward", first=2) == sorted(range(2), key=lambda i: -rewards[i])
    for prompt in read.prompts:
        prompt.record["all_ir_scores"] = None
    rows, unusable = policies(read.prompts, results, keep=1)
    assert "image_reward" in unusable
    assert not any(row.pictures == "ranked first" for row in rows)  # which is what is kept


def test_several_processes_judge_alike(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_workers(monkeypatch)
    read = open_folder(folder, SHAPES)
    outs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for out, devices, size in zip(outs, (["cpu"], ["cpu", "cpu"]), (32, 1), strict=True):
        found = evaluate(read, SHAPES, identity_of(SHAPES), judging_on(SHAPES, devices), size, out)
        assert found.new == 16
        assert found.missing == []
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert {r.correct for r in read_results(outs[0])} == {True, False}
    shutil.rmtree(folder)


_STUCK = """
import sys, time
sys.stdin.readline()
sys.stdin.readline()
print('{"batch": 0, "judged": []}', flush=True)
time.sleep(60)
"""


def test_an_interruption_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for the answers of killed processes end before those processes' logs are closed."""
    problems: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", problems.append)
    wait = subprocess.Popen.wait

    def late(process: Any, timeout: float | None = None) -> int:
        time.sleep(0.2 * (threading.current_thread() is not threading.main_thread()))
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", late)
    monkeypatch.setattr("scale_rae.processes.command", lambda module: [sys.executable, "-c", _STUCK])
    before = threading.active_count()
    answers = judging_on(SHAPES, ["cpu", "cpu"])([[Task("a.png", {"prompt": "p"})]] * 40)
    assert isinstance(answers, Iterator)
    assert next(answers) == (0, [])
    answers.close()
    assert threading.active_count() == before
    assert problems == []


_DIES = """
import os, sys
sys.stdin.readline()
sys.stdin.readline()
os.close(0)
print('{"batch": 0, "judged": []}', flush=True)
"""


def test_a_process_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did not read of its stdin is no error of its own."""
    monkeypatch.setattr("scale_rae.processes.command", lambda module: [sys.executable, "-c", _DIES])
    answers = judging_on(SHAPES, ["cpu", "cpu"])([[Task("a.png", {"prompt": "p"})]] * 20)
    with pytest.raises(DeviceError, match=r"the process that judges on cpu died \(exit code 0\)"):
        list(answers)
