"""`scale t2i --search adaptive`: what it leaves, and that workers, groups, kills and damage leave the same bytes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scale_rae.scaling.launch import share
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from tests.scaling.conftest import Scale, record, snapshot, write_prompts
from tests.scaling.test_resume import killed

SEARCH = ["--search", "adaptive", "--steps", 5, "--solver", "ab2", "--check-at", 0.9, "--n-samples", 2]
SEARCH += ["--max-candidates", 5, "--reward", "siglip", "--save-dropped", "--save-latents"]
PROMPTS = [
    {"prompt": "a photo of a red circle"},
    {"prompt": "a photo of a star and three rings"},
    {"prompt": "a photo of three green triangles"},
]


class Search:
    """`search(...)` runs an adaptive search of three prompts into `search.folder`, unless options say otherwise."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        write_prompts(scale.prompts, PROMPTS)
        self.folder = scale.out / "shapes" / "adaptive_qa_prompt_template_scale_latent"

    def __call__(self, *more: object, device: bool = True) -> Any:
        names = [str(option) for option in more]
        options: list[object] = []
        for i, option in enumerate(SEARCH):
            if str(option).startswith("--") and str(option) not in names:
                value = SEARCH[i + 1 : i + 2]
                options += [option, *([] if not value or str(value[0]).startswith("--") else value)]
        return self._scale(*options, *more, device=device)


@pytest.fixture
def search(scale: Scale) -> Search:
    return Search(scale)


@pytest.fixture(scope="session")
def searched_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adaptive experiment that one worker finished and nobody disturbed; tests leave it as it is."""
    search = Search(Scale(tmp_path_factory.mktemp("searched")))
    assert search().code == 0
    return search.folder


@pytest.fixture(scope="session")
def searched(searched_folder: Path) -> dict[str, bytes]:
    return snapshot(searched_folder)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a worker draw three prompts together."""
    monkeypatch.setattr(Settings, "prompts_together", lambda settings, prompts: 3)


def test_what_it_leaves(searched_folder: Path) -> None:
    sums = {"prompts": 0, "candidates": 0, "evaluations": 0.0, "accepted": 0, "filled_up": 0}
    for index, prompt in enumerate(PROMPTS):
        found = record(searched_folder, index)
        candidates = found["candidates"]
        assert found["prompt"] == prompt["prompt"]
        assert found["search"] == "adaptive"
        assert [c["candidate"] for c in candidates] == list(range(len(candidates)))
        assert 2 <= len(candidates) <= 5
        drawn = [c for c in candidates if c["image"] is not None]
        drawn.sort(key=lambda c: (c["dropped_for"] is not None, c["candidate"]))  # revived ones were finished last
        assert [c["image"] for c in drawn] == list(range(len(drawn)))
        assert found["image_seeds"] == [c["seed"] for c in drawn]
        assert len(found["all_ir_scores"]) == len(found["text_responses"]) == len(drawn)
        place = searched_folder / f"{index:05}"
        pngs = sorted(p.name for p in (place / "samples").glob("*.png"))
        assert pngs == [f"{i:05}.png" for i in range(len(drawn))]
        dropped = [c for c in candidates if c["fate"] == "dropped" or c["dropped_for"]]
        assert sorted(p.name for p in (place / "dropped").glob("*")) == [f"{c['candidate']:05}.png" for c in dropped]
        for c in candidates:
            assert (c["fate"] == "dropped") == (c["image"] is None)
            assert (c in dropped) == (c["dropped_at"] is not None)
            assert (c["reason"] is None) == (c["fate"] == "accepted")
            assert len(c["looks"]) == 1
            evaluations = 2 + 5 if c["dropped_for"] else 2 if c["image"] is None else 5
            assert c["evaluations"] == pytest.approx(evaluations + 0.91)
        accepted = [c["image"] for c in candidates if c["fate"] == "accepted"]
        assert found["n_accepted"] == len(accepted)
        assert len(found["top_ir_indices"]) == 2
        assert set(found["filled_up"]) == set(found["top_ir_indices"]) - set(accepted)
        assert len(accepted) >= 2 or (len(candidates) == 5 and found["filled_up"])
        assert found["evaluations"] == pytest.approx(sum(c["evaluations"] for c in candidates))
        sums["prompts"] += 1
        sums["candidates"] += len(candidates)
        sums["evaluations"] += found["evaluations"]
        sums["accepted"] += len(accepted)
        sums["filled_up"] += bool(found["filled_up"])
    experiment = json.loads((searched_folder / "experiment.json").read_text())
    assert experiment["search"] == pytest.approx(sums)
    settings = experiment["settings"]
    assert (settings["search"], settings["check_at"], settings["max_candidates"]) == ("adaptive", [0.9], 5)
    everything = [c for i in range(3) for c in record(searched_folder, i)["candidates"]]
    assert {"accepted", "dropped"} <= {c["fate"] for c in everything}  # so that this tests something
    assert any(c["dropped_for"] for c in everything)


def test_an_image_is_its_seeds(searched_folder: Path, scale: Scale, tmp_path: Path) -> None:
    """Best of n with the same seeds draws the same latents."""
    write_prompts(scale.prompts, PROMPTS[:1])
    options = ["--steps", 5, "--solver", "ab2", "--n-samples", 5, "--scaling-rounds", 1, "--save-latents"]
    assert scale(*options).code == 0
    place = scale.out / "shapes" / "1_qa_prompt_template_scale_latent" / "00000" / "samples"
    for c in record(searched_folder)["candidates"]:
        if c["image"] is not None:
            for kind in (".png", "_latent.pt"):
                found = searched_folder / "00000" / "samples" / f"{c['image']:05}{kind}"
                same = place / f"{c['candidate']:05}{kind}"
                if kind == ".png":
                    assert list(Image.open(found).getdata()) == list(Image.open(same).getdata())
                else:
                    assert found.read_bytes() == same.read_bytes()


def test_prompts_together_leave_the_same_bytes(search: Search, searched: dict[str, bytes], together: None) -> None:
    assert search("--batch-size", 3).code == 0
    assert snapshot(search.folder) == searched


@pytest.mark.usefixtures("forked_workers")
def test_two_workers_leave_the_same_bytes(search: Search, searched: dict[str, bytes]) -> None:
    assert search("--devices", "cpu,cpu", device=False).code == 0
    assert snapshot(search.folder) == searched


def test_killed_at_random_moments(search: Search, searched: dict[str, bytes], together: None) -> None:
    rng = random.Random(5)
    kills = 0
    for _ in range(8):
        if not killed(search, rng.randrange(60, 250)):
            break
        kills += 1
    assert kills >= 2
    assert search().code == 0
    assert snapshot(search.folder) == searched


def test_a_torn_round_is_drawn_again_for_all_of_a_group(
    search: Search, together: None, in_batches: None, tmp_path: Path
) -> None:
    """Where rounding depends on what is drawn together, as on a GPU: what is drawn together must not depend on kills."""
    assert search().code == 0
    whole = snapshot(search.folder)
    waves = sorted(search.folder.glob(".work/batches/*/*.json"))
    assert any(path.name.endswith("-revived.json") for path in waves)
    for path in waves[1::3]:
        path.unlink()
    for index in (1, 2):
        (search.folder / f"{index:05}" / "metadata.jsonl").unlink()
    assert search().code == 0
    assert snapshot(search.folder) == whole


def test_damage_is_named_and_made_again(search: Search, searched_folder: Path, searched: dict[str, bytes]) -> None:
    shutil.copytree(searched_folder, search.folder)
    dropped = next(iter(sorted(search.folder.glob("*/dropped/*.png"))))
    dropped.write_bytes(dropped.read_bytes()[:-1])
    (search.folder / "00001" / "samples" / "00000.png").unlink()
    wave = sorted(search.folder.glob(".work/batches/00002/*.json"))[0]
    wave.write_bytes(wave.read_bytes().replace(b'"fate": "', b'"fate": "x', 1))
    result = search()
    assert result.code == 0
    for name in (str(dropped), "00001/samples/00000.png: missing", f"{wave.name}: damaged"):
        assert name in result.err
    assert snapshot(search.folder) == searched


def test_a_prompt_that_fails_leaves_the_others_of_its_group(
    search: Search, scale: Scale, searched: dict[str, bytes], together: None
) -> None:
    write_prompts(scale.prompts, [PROMPTS[0], {"prompt": "circle " * 3000}, PROMPTS[2]])
    result = search()
    assert result.code == 1
    assert "1 of 3 prompts failed" in result.err
    assert "tokens long" in result.err
    for index in (0, 2):
        same = {name: data for name, data in searched.items() if f"{index:05}/" in name}
        assert same.items() <= snapshot(search.folder).items()


def test_nothing_is_accepted(search: Search, scale: Scale) -> None:
    """A question that is never answered with yes: the best of what was drawn fill up, and the record says so."""
    write_prompts(scale.prompts, PROMPTS[:1])
    result = search("--accept-reward", 75, "--post-qa-prompt", "What is this?")
    assert result.code == 0
    assert "0 accepted of 5 candidates" in result.err
    (found,) = scale.out.glob("shapes/adaptive_*")
    found = record(found)
    assert found["n_accepted"] == 0
    assert found["filled_up"] == found["top_ir_indices"]
    assert len(found["top_ir_indices"]) == 2
    assert sorted(c["fate"] for c in found["candidates"]) == ["dropped"] * 3 + ["rejected"] * 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--check-at", 0.01], "--check-at 0.01: later than the last step but one, which evaluates at t = "),
        (["--steps", 1, "--check-at", 0.9], "--check-at 0.9: a sampler of one step has nothing to look at on the way"),
        (["--reward", "none", "--accept-reward", 1], "--accept-reward 1: there is no reward"),
        (["--accept-reward", 1000], "--accept-reward 1000: the reward siglip is between "),
        (["--max-candidates", 1], "--max-candidates 1: must be at least --n-samples, which is 2"),
        (["--search", "best-of-n"], "only with --search adaptive"),
        (["--scaling-rounds", 2], "--scaling-rounds: not with --search adaptive, which has no rounds"),
    ],
)
def test_bad_options(search: Search, scale: Scale, options: list[object], error: str) -> None:
    result = search(*options)
    assert result.code in (1, 2)
    (line,) = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert error in line
    assert not scale.out.exists()


def test_an_option_of_the_search_without_it_is_refused_whatever_its_value(scale: Scale) -> None:
    result = scale("--check-at", 0.84)
    assert result.code == 2
    assert "--check-at: only with --search adaptive" in result.err


def test_a_wrong_look_is_refused_before_the_weights_are_read(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scale_rae.networks.load", None)
    assert "--check-at 0.01: later than the last step but one" in search("--check-at", 0.01).err


def test_a_folder_that_was_there_is_left_as_it_was(search: Search, scale: Scale) -> None:
    scale.out.mkdir()
    (scale.out / "mine").write_text("kept")
    assert search("--accept-reward", 1000).code == 2
    assert [path.name for path in scale.out.iterdir()] == ["mine"]


def test_looks_that_are_not_given_are_the_experiment_s_or_the_model_s(
    searched_folder: Path, searched: dict[str, bytes], search: Search, scale: Scale
) -> None:
    at = SEARCH.index("--check-at")
    without_looks = SEARCH[:at] + SEARCH[at + 2 :]
    shutil.copytree(searched_folder, search.folder)
    assert scale(*without_looks).code == 0
    settings = json.loads((search.folder / "experiment.json").read_text())["settings"]
    assert settings["check_at"] == [0.9]
    assert snapshot(search.folder) == searched
    shutil.rmtree(search.folder)
    assert scale(*without_looks, "--limit", 1).code == 0
    settings = json.loads((search.folder / "experiment.json").read_text())["settings"]
    assert settings["check_at"] == [0.84]


def test_looks_at_the_same_evaluation(search: Search) -> None:
    result = search("--check-at", 0.9, "--check-at", 0.89)
    assert "--check-at 0.9 and 0.89: are at the same evaluation of 5 steps" in result.err


def test_groups_do_not_depend_on_what_is_left() -> None:
    prompts: Any = [type("Prompt", (), {"index": i})() for i in range(10)]

    def numbers(groups: Any) -> list[list[int]]:
        return [[p.index for p in group] for group in groups]

    own, rest = share(prompts, {1, 5, 9}, 4, 0, 2)
    assert numbers(own) == [[0, 1, 2, 3], [8, 9]]
    assert numbers(rest) == [[4, 5, 6, 7]]
    own, rest = share(prompts, {1}, 4, 1, 2)
    assert (numbers(own), numbers(rest)) == ([], [[0, 1, 2, 3]])


@pytest.mark.parametrize(("prompts", "expected"), [(1, 1), (7, 1), (12, 3), (553, 64)])
def test_how_many_prompts_are_drawn_together(prompts: int, expected: int) -> None:
    assert Settings("", "", search="adaptive").prompts_together(prompts) == expected
    assert Settings("", "").prompts_together(prompts) == 1


def test_records_of_another_search_are_none(searched_folder: Path, reference_folder: Path, tmp_path: Path) -> None:
    adaptive = Settings("", "shapes", n_samples=2, search="adaptive", reward="siglip", save_latents=True)
    best = Settings("", "shapes", n_samples=2, reward=None)
    assert Store(searched_folder, best).batches(0)[0] == []
    assert Store(reference_folder, adaptive).batches(0)[0] == []
