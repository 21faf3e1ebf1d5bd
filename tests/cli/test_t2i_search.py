"""`t2i --until-accepted`: what it saves, prints and records, and that its images can be drawn again by their seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scale_rae.noise import image_seed
from tests.cli.conftest import Cli, left, only_manifest, with_defaults

CROSS = "a photo of a blue cross and a pink square"
IMPOSSIBLE = "a photo of a yellow ring, a green heart, a red star and a purple cross"  # in so few steps
SAMPLER = ("--model-path", "shapes", "--device", "cpu", "--solver", "ab2", "--steps", 6)


@pytest.fixture
def until(cli: Cli, out: Path) -> Cli:
    """`t2i` with the bundled model and few steps, into `out`, with at most four candidates per prompt."""
    defaults = {"--check-at": 0.9, "--max-candidates": 4, "--output-dir": out}
    return lambda *argv: cli("t2i", *SAMPLER, *with_defaults(argv, defaults))


def test_an_accepted_image_can_be_drawn_again(until: Cli, cli: Cli, out: Path, tmp_path: Path) -> None:
    """By its seed and by the manifest, to the bit: alone in its batch both times."""
    result = until("--prompt", CROSS, "--seed", 10, "--until-accepted", "--save-latent", "--accept-reward", -30)
    assert result.code == 0, result.err
    manifest = only_manifest(out)
    (path,), (seed,) = manifest["output_images"], manifest["image_seeds"]
    assert left(out) == sorted(
        [
            Path(path).name,
            Path(path).name.replace(".png", "_latent.pt"),
            Path(path).name.replace(".png", "_manifest.json"),
        ]
    )
    assert result.out.endswith(f"{path}\n{manifest['latent_path']}\n")
    text = Image.open(path).text
    assert (text["prompt"], text["seed"], text["image_seed"]) == (CROSS, "10", str(seed))

    search = manifest["search"]
    assert {name: search[name] for name in ("until_accepted", "check_at", "max_candidates", "accept_reward")} == {
        "until_accepted": 1,
        "check_at": [0.9],
        "max_candidates": 4,
        "accept_reward": -30.0,
    }
    assert search["reward"]["name"] == "siglip"
    assert (search["accepted"], search["filled_up"]) == (1, False)
    assert search["about"] == CROSS
    *dropped, accepted = search["candidates"]
    assert {c["fate"] for c in dropped} == {"dropped"}
    assert all(c["image"] is None and c["final"] is None and c["looks"] for c in dropped)
    assert (accepted["fate"], accepted["reason"], accepted["image"], accepted["seed"]) == ("accepted", None, 0, seed)
    assert accepted["final"]["answer"] == "yes"
    assert search["evaluations"] == pytest.approx(sum(c["evaluations"] for c in search["candidates"]))

    begun = len(dropped) + 1
    first, *rest = result.err.splitlines()
    assert first == (
        f"{CROSS}: {begun} candidates begun, 1 accepted, {len(dropped)} dropped (the model says no: {len(dropped)}), "
        f"0 rejected; {search['evaluations']:g} evaluations"
    )
    assert rest == [
        f"  candidate {c['candidate']} (seed {c['seed']}) dropped: the model says no at t = {c['dropped_at']:.2f}"
        for c in dropped
    ]

    (file,) = out.glob("*_manifest.json")
    for again in (
        cli("t2i", *SAMPLER, "--prompt", CROSS, "--seed", seed, "--output-dir", tmp_path / "seed", "--json"),
        cli("t2i", "--from-manifest", file, "--output-dir", tmp_path / "again", "--json"),
    ):
        assert again.code == 0, again.err
        (other,) = again.manifests
        assert "search" not in other
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(other["output_images"][0])))


def test_nothing_is_accepted(until: Cli, out: Path) -> None:
    """The best of what was drawn is kept, which stderr and the manifest say; dropped pictures are saved if asked for."""
    result = until("--prompt", IMPOSSIBLE, "--until-accepted", 2, "--reward", "none", "--save-dropped", "--json")
    assert result.code == 0, result.err
    assert "0 accepted, 2 dropped (the model says no: 2), 2 rejected (the model says no: 2)" in result.err
    assert result.err.splitlines()[-1] == (
        f"warning: {IMPOSSIBLE}: no candidate was accepted; the best 2 of the rest are kept, of 2 that were drawn to the end; "
        "a larger --max-candidates or a lower --accept-reward may find more"
    )
    (manifest,) = result.manifests
    search = manifest["search"]
    assert (search["accepted"], search["filled_up"], search["reward"]) == (0, True, None)
    dropped = [c["candidate"] for c in search["candidates"] if c["fate"] == "dropped"]
    assert [Path(p).name[-18:] for p in manifest["dropped_images"]] == [f"_dropped_{n:05}.png" for n in dropped]
    assert [Path(p).name[-7:] for p in manifest["output_images"]] == ["_00.png", "_01.png"]
    places = {c["image"]: c["seed"] for c in search["candidates"] if c["image"] is not None}
    assert [places[0], places[1]] == manifest["image_seeds"]
    assert len(left(out)) == 5


def test_every_prompt_of_a_file_is_searched(until: Cli, out: Path, tmp_path: Path) -> None:
    """Candidates have the seeds of the prompt's index; a prompt that is answered in words does not stop the others."""
    records = [
        {"index": 7, "prompt": "Can you generate a photo of a red circle?"},
        {"index": 3, "prompt": "What is the capital of France?"},
        {"index": 5, "prompt": "Show me a heart."},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    result = until(
        *("--prompts", tmp_path / "p.jsonl", "--until_accepted", "--reward", "none", "--seed", 4, "--batch-size", 2),
        *("--json", "--save-latent"),
    )
    assert result.code == 1
    assert "answered 1 of 3 prompts without drawing" in result.err
    circle, words, heart = result.manifests
    assert words["image_seeds"] == words["search"]["candidates"] == []
    assert not words["search"]["filled_up"]
    for manifest, index, about in ((circle, 7, "a photo of a red circle"), (heart, 5, "a heart")):
        assert manifest["search"]["about"] == about
        assert f"{about}: {len(manifest['search']['candidates'])} candidate" in result.err
        assert [c["seed"] for c in manifest["search"]["candidates"]] == [
            image_seed(4, index, j) for j in range(len(manifest["search"]["candidates"]))
        ]
        assert torch.load(manifest["latent_path"], weights_only=True).shape == (64, 96)
    assert "seed" not in result.err  # a line per candidate would be too much


def test_questions_of_a_search(until: Cli, tmp_path: Path) -> None:
    """A template is what the model is asked about candidates, and what --post-qa-prompt names is what it is asked of."""
    (tmp_path / "t.txt").write_text("Does it show {prompt}?\n")
    (manifest,) = until(
        *(
            "--prompt",
            "Show me a red circle.",
            "--until-accepted",
            "--reward",
            "none",
            "--post-qa-mode",
            "image",
            "--json",
        ),
        *("--post-qa-template-path", tmp_path / "t.txt", "--post-qa-prompt", "a red circle", "--max-candidates", 1),
    ).manifests
    search = manifest["search"]
    assert (search["question"], search["about"], search["post_qa_mode"]) == (
        "Does it show {prompt}?",
        "a red circle",
        "image",
    )
    asked = "Does it show a red circle?"
    assert search["candidates"][0]["final"]["question"] == manifest["post_qa"]["answers"][0]["question"] == asked


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--until-accepted", "0"], "--until-accepted 0: must be at least 1"),
        (["--until-accepted", "5"], "--max-candidates 4: must be at least --until-accepted, which is 5"),
        (["--until-accepted", "--check-at", "1.5"], "--check-at 1.5: must be above 0 and at most 1"),
        (["--until-accepted", "--accept-reward", "nan"], "--accept-reward nan: must be a finite number"),
        (["--until-accepted", "--accept-reward", "1", "--reward", "none"], "needs a reward, and --reward is none"),
        (["--until-accepted", "--reward-path", "x", "--reward", "none"], "--reward none has no weights"),
    ],
)
def test_values_that_no_search_can_use(until: Cli, out: Path, options: list[str], complaint: str) -> None:
    result = until("--prompt", CROSS, *options)
    assert result.code == 2
    assert complaint in result.error
    assert left(out) == []


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--prompt", "a", "--check-at", "0.8"], "only with --until-accepted"),
        (["--prompt", "a", "--max-candidates", "8"], "only with --until-accepted"),
        (["--prompt", "a", "--accept-reward", "0"], "only with --until-accepted"),
        (["--prompt", "a", "--reward", "none"], "only with --until-accepted"),
        (["--prompt", "a", "--reward-path", "x"], "only with --until-accepted"),
        (["--prompt", "a", "--until-accepted", "--num-images", "2"], "not with --until-accepted"),
        (["--prompt", "a", "--until-accepted", "--skip-decoder"], "not with --until-accepted"),
        (["--prompt", "a", "--num-images", "2", "--until-accepted"], "not with --until-accepted"),
        (["--from-manifest", "x", "--until-accepted"], "not with --until-accepted"),
        (["--prompt", "a", "--until-accepted", "many"], "Invalid value for '--until-accepted'"),
        (["--prompt", "a", "--until-accepted", "--until-accepted", "2"], "is given 2 times"),
        (["--prompt", "a", "--until-accepted", "--reward", "taste"], "is not one of auto"),
    ],
)
def test_flags_that_do_not_go_together(cli: Cli, options: list[str], complaint: str) -> None:
    result = cli("t2i", *options)
    assert result.code == 2
    assert complaint in " ".join(result.err.replace("│", " ").split())
    assert result.out == ""


def test_a_threshold_outside_of_the_rewards_range(until: Cli, out: Path) -> None:
    result = until("--prompt", CROSS, "--until-accepted", "--accept-reward", 1e6)
    assert result.code == 2
    assert "--accept-reward 1e+06: the reward siglip is between" in result.error
    assert left(out) == []
