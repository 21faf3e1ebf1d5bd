"""`scale-rae score`: what it leaves is what drawing with the reward leaves, however often it is killed."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scale_rae.cli import main
from scale_rae.errors import OutputError
from scale_rae.rewards.siglip import SiglipReward
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from tests.helpers.made_experiment import write_experiment
from tests.scaling.conftest import NAME, PROMPTS, Result, Scale, record, snapshot, write_prompts
from tests.scaling.test_resume import killed

Score = Callable[..., Result]


@pytest.fixture
def score(capsys: pytest.CaptureFixture[str]) -> Score:
    """Runs `scale-rae score DIR --reward siglip --device cpu`, unless options say otherwise."""

    def run(folder: Path, *more: object, reward: str = "siglip") -> Result:
        capsys.readouterr()
        code = main([str(a) for a in ("score", folder, "--reward", reward, "--device", "cpu", *more)])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def with_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's prompts, drawn with the reward."""
    scale = Scale(tmp_path_factory.mktemp("with_reward"))
    assert scale("--reward", "siglip").code == 0
    return scale.folder


def described(folder: Path) -> bytes:
    """experiment.json as it would be after a run of no duration."""
    value = json.loads((folder / "experiment.json").read_text())
    value["settings"]["metadata_file"] = "prompts.jsonl"
    return json.dumps(value | {"seconds": 0}).encode()


def test_the_same_as_drawing_with_the_reward(finished: Scale, with_reward: Path, score: Score) -> None:
    result = score(finished.folder)
    assert result.code == 0, result.err
    assert result.out == f"{finished.folder}\n"
    assert re.search(r"\n3 prompts have the scores of siglip; 12 images scored in \d+ s\n$", result.err)
    assert "note:" not in result.err
    assert snapshot(finished.folder) == snapshot(with_reward)
    assert described(finished.folder) == described(with_reward)
    assert not (finished.folder / ".work" / "scoring").exists()
    store = Store(finished.folder, Settings("", ""))
    assert store.restore_experiment() is None  # its copy agrees

    again = finished("--reward", "siglip")
    assert again.code == 0, again.err
    assert "0 images drawn" in again.err
    assert snapshot(finished.folder) == snapshot(with_reward)
    assert main(["select", str(finished.folder), "--metric", "image_reward"]) == 0

    refused = score(finished.folder)
    assert refused.code == 1
    assert refused.err.startswith(
        f"error: {finished.folder}: has the scores of siglip already, which stay as they are;"
    )
    assert score(finished.folder, reward="pickscore").code == 1
    assert snapshot(finished.folder) == snapshot(with_reward)


def test_killed_at_every_write(
    finished: Scale, with_reward: Path, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until all is scored, the records are as they were; after that, the next start goes on with them."""
    monkeypatch.setattr("tests.scaling.test_resume.TOUCHES", ("os.rename", "os.remove"))  # when a file changes
    before, after = snapshot(finished.folder), snapshot(with_reward)
    rng, states, first = random.Random(6), list[int](), [2, 3, 4]
    while killed(lambda: score(finished.folder), first.pop(0) if first else rng.randrange(3, 9)):
        now = snapshot(finished.folder)
        assert now.keys() == before.keys()
        assert all(now[name] in (before[name], after[name]) for name in now)
        states.append(sum(now[name] != before[name] for name in now))
        read = Store(finished.folder, Settings("", "")).read_experiment()
        assert read is not None
        assert "seconds" in read
    assert states == sorted(states)  # nothing is undone
    assert states[:3] == [0, 0, 0]
    assert len(set(states)) >= 4
    assert snapshot(finished.folder) == after
    assert described(finished.folder) == described(with_reward)


def test_what_could_not_be_tidied_up_does_no_harm(
    finished: Scale, with_reward: Path, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill while the files of .work/scoring are removed."""
    unlink, removed = Path.unlink, list[str]()

    def once(self: Path, missing_ok: bool = False) -> None:
        if self.parent.name == "scoring":
            if removed:
                raise OSError("gone")
            removed.append(self.name)
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", once)
        assert score(finished.folder).code == 0
    assert removed
    refused = score(finished.folder)
    assert refused.code == 1
    assert refused.err.startswith(f"error: {finished.folder}: has the scores of siglip already")
    assert snapshot(finished.folder) == snapshot(with_reward)


def torn(folder: Path, score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a run end when it has written one prompt's records."""
    finish = Store.finish

    def once(self: Store, prompt: Any) -> dict[str, Any]:
        if prompt.index == 2:
            raise OutputError("the disk is full")
        return finish(self, prompt)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "finish", once)
        assert score(folder).code == 1


def test_a_torn_run_goes_on_with_the_same_reward_alone(
    finished: Scale, with_reward: Path, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn(finished.folder, score, monkeypatch)
    assert record(finished.folder)["reward"] == "siglip"
    assert record(finished.folder, 2)["reward"] is None
    result = score(finished.folder, reward="pickscore")
    assert result.code == 1
    assert "a run that was stopped is adding the reward siglip; let it finish with --reward siglip" in result.err

    identity = SiglipReward.identity
    with monkeypatch.context() as patch:
        patch.setattr(SiglipReward, "identity", lambda self: identity(self) | {"weights": {"revision": "x"}})
        result = score(finished.folder)
        assert result.code == 1
        assert "from other files" in result.err or "another model" in result.err

    scored: list[int] = []
    value = SiglipReward.score
    monkeypatch.setattr(
        SiglipReward, "score", lambda self, images, text: scored.append(len(images)) or value(self, images, text)
    )
    assert score(finished.folder).code == 0
    assert not scored  # all were scored before
    assert snapshot(finished.folder) == snapshot(with_reward)


def test_a_reward_with_too_few_scores_is_named(finished: Scale, score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(finished.folder)
    monkeypatch.setattr(SiglipReward, "score", lambda self, images, prompt: [0.0] * (len(images) - 1))
    result = score(finished.folder)
    assert result.code == 1
    assert re.search(r"the reward gave \d scores? for \d images?", result.err)
    assert snapshot(finished.folder) == before


def test_in_the_batches_they_were_drawn_in(finished: Scale, score: Score, in_batches: None) -> None:
    """As on a device that scores a batch at once."""
    scored: list[int] = []
    value = SiglipReward.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SiglipReward, "score", lambda self, images, text: scored.append(len(images)) or value(self, images, text)
        )
        assert score(finished.folder).code == 0
    assert scored == [2] * 6


def test_prompts_that_are_not_finished_stay(
    finished: Scale, with_reward: Path, score: Score, reference: dict[str, bytes]
) -> None:
    (finished.folder / "00002" / "metadata.jsonl").unlink()
    (finished.folder / "00007" / "samples" / "00001.png").write_bytes(b"damaged")
    result = score(finished.folder, "--json")
    assert result.code == 0, result.err
    assert "skipped 00002: is not finished\n" in result.err
    assert "skipped 00007: " in result.err
    value = json.loads(result.out)
    assert (value["prompts"], value["images"], value["scored"]) == (1, 4, 4)
    assert value["reward"]["name"] == "siglip"
    assert list(value["incomplete"]) == ["00002", "00007"]
    assert finished("--reward", "siglip").code == 0  # draws them, with the reward
    assert snapshot(finished.folder) == snapshot(with_reward)


def test_fields_of_the_prompt_file_stay(tmp_path: Path, scale: Scale, score: Score) -> None:
    """Also those that have the names of ours, and their order."""
    odd = [{"reward": 3, "tag": "t", "prompt": PROMPTS[0]["prompt"], "seed": [1], "index": 0, "top_ir_scores": "mine"}]
    write_prompts(scale.prompts, odd)
    folders = []
    for name, reward in (("a", "none"), ("b", "siglip")):
        scale.out = tmp_path / name
        scale.folder = scale.out / NAME
        assert scale("--reward", reward).code == 0
        folders.append(scale.folder)
    assert score(folders[0]).code == 0
    assert snapshot(folders[0]) == snapshot(folders[1])
    assert record(folders[0])["prompt_fields"] == {"reward": 3, "top_ir_scores": "mine"}


def test_what_is_refused(finished: Scale, score: Score, tmp_path: Path) -> None:
    folder, before = finished.folder, snapshot(finished.folder)
    assert score(tmp_path / "none").err == f"error: {tmp_path}/none: no such folder; give one that `scale t2i` made\n"
    assert score(folder, reward="best").code == 2
    assert score(folder, "--batch-size", 0).code == 2
    assert score(folder, "--device", "gpu").code == 2
    assert "takes no path" in score(folder, "--reward-path", tmp_path).err
    with Store(folder, Settings("", "")).lock_run():
        assert "is at work here" in score(folder).err
    path = folder / "experiment.json"
    (folder / ".work" / "experiment.json").unlink()
    said = json.loads(path.read_text())
    said["settings"]["search"] = "adaptive"
    path.write_text(json.dumps(said))
    assert "was searched adaptively" in score(folder).err
    path.write_text(json.dumps({"settings": {"n_samples": "four"}}))
    assert f"{path}: settings cannot be used" in score(folder).err
    path.write_text(json.dumps({"settings": None}))
    assert f"{path}: has no settings" in score(folder).err
    path.unlink()
    assert "missing, so it is not known what drew the results" in score(folder).err
    assert snapshot(folder) == before


def test_a_folder_of_the_official_code(finished: Scale, with_reward: Path, score: Score, tmp_path: Path) -> None:
    """No experiment.json, no .work: the scores go into metadata.jsonl."""
    folder = tmp_path / "official"
    for index in ("00000", "00002"):
        shutil.copytree(finished.folder / index, folder / index)
    old = record(folder)
    del old["reward"], old["model_path"]
    (folder / "00000" / "metadata.jsonl").write_text(json.dumps(old) + "\n")
    result = score(folder, "--model-path", "shapes")
    assert result.code == 0, result.err
    new, drawn = record(folder), record(with_reward)
    names = ("reward", "all_ir_scores", "top_ir_scores", "top_ir_indices")
    assert {name: new[name] for name in names} == {name: drawn[name] for name in names}
    assert {n: v for n, v in new.items() if n not in names} == {n: v for n, v in old.items() if n not in names}
    assert record(folder, 2) == record(with_reward, 2)
    assert main(["select", str(folder), "--metric", "image_reward"]) == 0
    assert "has the scores of siglip already" in score(folder, "--model-path", "shapes").err


def test_a_folder_that_names_no_model(tmp_path: Path, score: Score) -> None:
    folder = write_experiment(tmp_path / "e", 1, 2, 1, reward=False)
    (folder / "experiment.json").unlink()
    path = folder / "00000" / "metadata.jsonl"
    metadata = json.loads(path.read_text())
    del metadata["model_path"]
    path.write_text(json.dumps(metadata))
    assert "name the model with --model-path" in score(folder).err
