"""What the page asks of the model, without a page."""

from __future__ import annotations

import itertools
import json
import shlex
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from scale_rae.acceptance import ACCEPTED, DROPPED, REJECTED
from scale_rae.checkpoint import load_latent
from scale_rae.cli import main
from scale_rae.demo.limits import MOST_CANDIDATES, MOST_IMAGES, check_sampling
from scale_rae.demo.results import DrawResult, Preview, RankingState, SearchState
from scale_rae.demo.shared_model import SharedModel
from scale_rae.demo.streams import streamed
from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.language import hear_text
from scale_rae.noise import new_seed
from scale_rae.options import Sampling, SamplingOptions, SearchOptions
from scale_rae.prompt_search import search

T = TypeVar("T")
R = TypeVar("R")
CIRCLE = "a red circle"
FEW = Sampling(num_images=2, seed=7, options=SamplingOptions(steps=3, guidance=2.0))


def run(work: Generator[T, None, R]) -> tuple[list[T], R]:
    """All that a generator yields, and what it returns."""
    said: list[T] = []
    while True:
        try:
            said.append(next(work))
        except StopIteration as stop:
            return said, stop.value


@pytest.fixture(scope="module")
def drawn(shared: SharedModel) -> tuple[list[Preview], DrawResult]:
    return run(shared.draw(CIRCLE, FEW))


def test_pictures_form_while_they_are_drawn(drawn: tuple[list[Preview], DrawResult]) -> None:
    steps, result = drawn
    assert [step.text for step in steps] == [f"Step {i} of 3" for i in (1, 2, 3)]
    assert [round(step.done, 2) for step in steps] == [0.33, 0.67, 1.0]
    assert all(len(step.pictures) == 2 for step in steps)
    assert len({picture.tobytes() for step in steps for picture in step.pictures}) == 4  # the last step is the odd one
    assert len(result.images) == 2


def test_pictures_get_nearer(shared: SharedModel) -> None:
    steps, result = run(shared.draw(CIRCLE, Sampling(options=SamplingOptions(steps=12))))
    final = np.asarray(result.images[0].image).astype(float)
    off = [float(np.abs(np.asarray(step.pictures[0]) - final).mean()) for step in steps]
    assert off[-1] == min(off) < off[0]


def test_the_last_estimate_without_a_step_to_go_is_the_latent(shared: SharedModel) -> None:
    """dpmpp_2m ends at t = 0 with the data estimate itself."""
    seen: list[torch.Tensor] = []
    result = shared.model.generate(
        "Can you generate a red circle?",
        steps=3,
        solver="dpmpp_2m",
        callback=lambda _i, _n, t, x, v: seen.append(shared.model.estimate(t, x, v)[0]),
    )
    latent = result.images[0].latent
    assert seen[-1].shape == latent.shape
    assert float((seen[-1] - latent).abs().max()) <= 1e-5 * float(latent.abs().max())


def test_everything_of_an_image_can_be_taken_home(shared: SharedModel, drawn: tuple[list[Preview], DrawResult]) -> None:
    _, result = drawn
    first, second = result.images
    assert first.seed == 7
    assert second.seed != 7
    for drawing in result.images:
        assert np.array_equal(Image.open(drawing.png), drawing.image)
        assert torch.equal(load_latent(drawing.latent_file), drawing.latent)
        recorded = json.loads(drawing.manifest.read_text())
        assert recorded["image_seeds"] == [drawing.seed]
        assert recorded["output_images"] == [str(drawing.png)]
        assert recorded["prompt"] == drawing.request == "Can you generate a red circle"


def test_the_command_line_draws_the_same(
    shared: SharedModel, drawn: tuple[list[Preview], DrawResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, result = drawn
    program, *arguments = shlex.split(result.images[1].command)
    assert program == "scale-rae"
    assert main([*arguments, "--output-dir", str(tmp_path / "again")]) == 0
    again = Image.open(next((tmp_path / "again").glob("*.png")))
    difference = np.asarray(again).astype(int) - np.asarray(result.images[1].image)
    assert np.abs(difference).max() <= 2  # drawn alone, not with another: rounding
    assert main(["t2i", "--from-manifest", str(result.images[1].manifest), "--output-dir", str(tmp_path / "m")]) == 0
    assert np.array_equal(again, Image.open(next((tmp_path / "m").glob("*.png"))))
    _, *arguments = shlex.split(result.command)
    assert main([*arguments, "--output-dir", str(tmp_path / "both")]) == 0
    for drawing, path in zip(result.images, sorted((tmp_path / "both").glob("*.png")), strict=True):
        assert np.array_equal(drawing.image, Image.open(path))
    capsys.readouterr()


def test_a_command_line_says_which_model_and_quotes_what_must_be(shared: SharedModel) -> None:
    command = shared.command("it's $HOME; rm -rf", Sampling(seed=2**62))
    words = shlex.split(command)
    assert words[words.index("--prompt") + 1] == "it's $HOME; rm -rf"
    assert words[words.index("--seed") + 1] == str(2**62)
    assert words[words.index("--model-path") + 1] == "shapes"
    assert words[words.index("--device") + 1] == "cpu"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_images": 0}, "the page draws 1 to"),
        ({"num_images": MOST_IMAGES + 1}, "the page draws 1 to"),
        ({"options": SamplingOptions(steps=1)}, "the euler solver"),
        ({"options": SamplingOptions(steps=100_000)}, "at most"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "less than"),
        ({"options": SamplingOptions(guidance=float("nan"))}, "guidance level nan"),
        ({"options": SamplingOptions(solver="rk4")}, "'rk4' is unknown"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_runs(
    shared: SharedModel, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        next(shared.draw(CIRCLE, Sampling(**change)))
    with pytest.raises(InputError, match=says):
        check_sampling(Sampling(**change))


def test_empty_prompts_and_questions_are_refused(shared: SharedModel) -> None:
    for work in (
        shared.draw("  ", FEW),
        shared.best_of("", FEW, 1, "combined", None),
        shared.search("", FEW, 1, 2, None),
        shared.ask(" ", latent=torch.zeros(1)),
    ):
        with pytest.raises(InputError, match="first"):
            next(work)
    with pytest.raises(InputError, match="Choose a picture first"):
        next(shared.ask("What?"))


def test_a_reply_without_a_drawing_is_an_error_that_quotes_it(
    shared: SharedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = shared.model.tokenizer.chat_end
    monkeypatch.setattr(shared.model.tokenizer, "image_start", stop)  # a model that never asks for one
    with pytest.raises(InputError, match="answered without drawing"):
        run(shared.draw(CIRCLE, FEW))
    with pytest.raises(InputError, match="answered without drawing"):
        run(shared.best_of(CIRCLE, FEW, 1, "combined", None))
    with pytest.raises(InputError, match="answered without drawing"):
        run(shared.search(CIRCLE, FEW, 1, 2, None))


def test_an_answer_grows(shared: SharedModel, drawn: tuple[list[Preview], DrawResult]) -> None:
    latent = drawn[1].images[0].latent
    said, (text, cut_off) = run(shared.ask("Describe this image.", latent=latent))
    assert len(said) > 2
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(said))
    assert text == said[-1] == shared.model.answer("Describe this image.", latents=latent)[0].text
    assert not cut_off


def test_a_picture_of_ones_own_is_read_through_the_encoder(shared: SharedModel, tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    Image.new("RGB", (50, 40), "red").save(path)
    _, (text, _) = run(shared.ask("Describe this image.", image=path))
    assert text == shared.model.answer("Describe this image.", images=Image.open(path))[0].text
    path.write_text("no picture")
    with pytest.raises(InputError) as caught:
        run(shared.ask("Describe this image.", image=path))
    assert str(caught.value).startswith("mine.png: ")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("stops", [1, 3])
def test_a_listener_can_end_an_answer(shared: SharedModel, stops: int) -> None:
    heard: list[tuple[int, str]] = []

    def listen(i: int, text: str) -> bool:
        heard.append((i, text))
        return sum(1 for j, _ in heard if j == i) < stops

    latent = torch.zeros(shared.model.config.tokens, shared.model.config.channels)
    questions = ["Describe this image.", "Is there a red circle?"]
    answers = shared.model.answer(questions, latents=latent, listen=listen)
    for i, answer in enumerate(answers):
        mine = [text for j, text in heard if j == i]
        assert len(mine) <= stops
        assert answer.text == mine[-1]


def test_half_a_character_is_not_shown(shared: SharedModel) -> None:
    heard: list[str] = []

    def listen(_: int, text: str) -> bool:
        heard.append(text)
        return True

    hear = hear_text(shared.model.tokenizer, listen)
    for token in shared.model.tokenizer.plain("né 猫!"):
        assert hear(0, token)
    assert heard[-1] == "né 猫!"
    assert not any("\ufffd" in text for text in heard)


def test_latent_files(shared: SharedModel, drawn: tuple[list[Preview], DrawResult], tmp_path: Path) -> None:
    drawing = drawn[1].images[0]
    latent = shared.latent(drawing.latent_file)
    assert np.array_equal(shared.decode(latent), drawing.image)
    bad = tmp_path / "bad.pt"
    for value, says in (
        ("no latent", "not a file that torch.save wrote"),
        (torch.zeros(3, 4), r"the latent is \[3, 4\]"),
    ):
        if isinstance(value, str):
            bad.write_text(value)
        else:
            torch.save(value, bad)
        with pytest.raises(InputError, match=says) as caught:
            shared.latent(bad)
        assert str(caught.value).startswith("bad.pt: ")
        assert str(tmp_path) not in str(caught.value)


def test_going_on_from_a_latent(shared: SharedModel, drawn: tuple[list[Preview], DrawResult]) -> None:
    file = drawn[1].images[0].latent_file
    request = "Can you generate a photo of a red circle?"
    _, result = run(shared.draw(request, FEW, file))
    expected = shared.model.generate(
        request, latents=[shared.latent(file)], num_images=2, steps=3, guidance=2.0, seed=7
    )
    assert result.text == expected.text
    assert len(result.images) == len(expected.images)
    assert shlex.split(result.command)[:6] == ["scale-rae", "latent", "--action", "continue", "--latent", file.name]


@pytest.fixture(scope="module")
def ranked(shared: SharedModel) -> tuple[list[RankingState], RankingState]:
    sampling = Sampling(num_images=5, seed=3, options=SamplingOptions(steps=3))
    return run(shared.best_of("a red circle and a blue square", sampling, 2, "combined", "siglip"))


def test_best_of_n_ranks_while_it_draws(ranked: tuple[list[RankingState], RankingState]) -> None:
    steps, done = ranked
    assert sorted({len(step.images) for step in steps}) == [0, 2, 4, 5]
    assert [judged.place for judged in done.images] == [0, 1, 2, 3, 4]
    assert [judged.kept for judged in done.images] == [True, True, False, False, False]
    assert all((judged.why is None) == judged.kept for judged in done.images)
    assert [d.seed for d in done.saved] == [judged.seed for judged in done.images]
    assert {"combined", "reward", "prompt_loss"} <= set(done.images[0].scores)


def test_best_of_n_scores_as_the_model_and_the_reward_do(
    shared: SharedModel, ranked: tuple[list[RankingState], RankingState]
) -> None:
    _, done = ranked
    prompt = "a red circle and a blue square"
    scores = shared.model.score([j.latent for j in done.images], prompt, request=f"Can you generate {prompt}")
    reward = shared.reward("siglip")
    assert reward is not None
    rewards = reward.score([j.image for j in done.images], prompt)
    for judged, score, value in zip(done.images, scores, rewards, strict=True):
        assert judged.answer == score.answer
        assert judged.scores["prompt_loss"] == pytest.approx(score.prompt_loss, rel=1e-3)
        assert judged.scores["reward"] == pytest.approx(value, rel=1e-3)
    order = {"yes": 0, "uncertain": 1, "no": 2}
    places = [order[judged.answer] for judged in done.images]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("keep", "metric", "reward", "says"),
    [
        (3, "combined", None, "3 cannot be kept"),
        (0, "combined", None, "0 cannot be kept"),
        (1, "beauty", None, "'beauty' is not one of"),
        (1, "image_reward", None, "needs a reward model"),
        (1, "combined", "beauty", "no such reward"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    shared: SharedModel, keep: int, metric: str, reward: str | None, says: str
) -> None:
    with pytest.raises(ScaleRAEError, match=says):
        run(shared.best_of(CIRCLE, FEW, keep, metric, reward))


TWO = "a photo of a circle and a diamond"
SEARCHED = Sampling(seed=3, options=SamplingOptions(steps=10, solver="ab2"))


@pytest.fixture(scope="module")
def found(shared: SharedModel) -> tuple[list[SearchState], SearchState]:
    return run(shared.search(TWO, SEARCHED, 2, 8, "siglip"))


def test_candidates_appear_form_and_end_with_a_fate(found: tuple[list[SearchState], SearchState]) -> None:
    steps, done = found
    first = steps[0].cards
    assert [(card.fate, card.picture, card.answer) for card in first] == [("", None, None)] * 3
    assert any(card.picture is not None and not card.fate for step in steps for card in step.cards)
    shares = [step.done for step in steps]
    assert shares == sorted(shares)
    for before, after in itertools.pairwise([step.cards for step in steps]):
        assert [card.number for card in after] == list(range(len(after)))  # in the order of their beginning
        assert len(before) <= len(after)
        assert all(old.fate in ("", DROPPED, new.fate) for old, new in zip(before, after, strict=False))
    assert {card.fate for card in done.cards} <= {ACCEPTED, REJECTED, DROPPED}
    for card in done.cards:
        assert (card.why is None) == (card.fate == ACCEPTED)
        assert card.picture is not None
        assert card.scores["reward"] is not None
        assert (card.t is None) == (card.fate != DROPPED)
    assert any(card.fate != ACCEPTED for card in done.cards)


def test_kept_images_of_a_search_stand_first_and_can_be_drawn_again(
    shared: SharedModel,
    found: tuple[list[SearchState], SearchState],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, done = found
    assert [card.place for card in done.cards] == [0, 1] + [None] * (len(done.cards) - 2)
    assert [saved.seed for saved in done.saved] == [card.seed for card in done.cards[:2]]
    alone = search(shared.model, TWO, keep=2, reward="siglip", options=SEARCHED.options, seed=SEARCHED.seed,
                   search=SearchOptions(max_candidates=8))  # fmt: skip
    fates = {c.number: c.fate for c in alone.candidates}
    assert {card.number: card.fate for card in done.cards} == fates
    assert [image.seed for image in alone.images] == [saved.seed for saved in done.saved]
    begun = f"{len(done.cards)} candidates begun, "
    assert done.progress.startswith(begun)
    assert f"; {alone.evaluations:.0f} evaluations" in done.progress
    first = done.saved[0]
    recorded = json.loads(first.manifest.read_text())
    assert recorded["image_seeds"] == [first.seed]
    _, *arguments = shlex.split(first.command)
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 0
    again = Image.open(next(tmp_path.glob("*.png")))
    assert np.abs(np.asarray(again).astype(int) - np.asarray(first.image)).max() <= 2
    capsys.readouterr()


def test_a_search_that_accepts_too_few_says_so(shared: SharedModel) -> None:
    hard = "a photo of two stars and two hearts"
    _, done = run(shared.search(hard, Sampling(options=SamplingOptions(steps=4)), 2, 3, None))
    accepted = sum(card.fate == ACCEPTED for card in done.cards)
    assert accepted < 2
    assert len(done.saved) == 2
    assert "None was accepted: the best 2 images" in done.progress or "Only 1 of 2 accepted" in done.progress


@pytest.mark.parametrize(
    ("keep", "most", "says"),
    [
        (3, 2, "3 cannot be kept: keep 1 to 2"),
        (0, 2, "0 cannot be kept"),
        (1, MOST_CANDIDATES + 1, "the page begins 1 to"),
        (MOST_IMAGES + 1, MOST_CANDIDATES, "keep 1 to 16"),
    ],
)
def test_what_cannot_be_searched_is_refused(shared: SharedModel, keep: int, most: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        run(shared.search(CIRCLE, Sampling(options=SamplingOptions(steps=9, solver="ab2")), keep, most, None))


def test_one_step_is_searched_without_a_look(shared: SharedModel) -> None:
    _, done = run(shared.search(CIRCLE, Sampling(options=SamplingOptions(steps=1, solver="ab2")), 1, 2, None))
    assert len(done.saved) == 1
    assert all(card.fate in (ACCEPTED, REJECTED) for card in done.cards)


@pytest.mark.parametrize("searching", [False, True])
def test_who_leaves_stops_the_work(shared: SharedModel, searching: bool) -> None:
    before = set(shared.folder.iterdir())
    sampling = Sampling(num_images=1 if searching else 2, options=SamplingOptions(steps=200))
    work: Any = shared.search(CIRCLE, sampling, 2, 8, None) if searching else shared.draw(CIRCLE, sampling)
    next(work)
    assert shared.busy
    work.close()
    end = time.monotonic() + 240  # against hanging only
    while shared.busy:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert set(shared.folder.iterdir()) == before


def test_a_second_visitor_waits(shared: SharedModel) -> None:
    first = shared.draw(CIRCLE, Sampling(options=SamplingOptions(steps=60)))
    next(first)
    order: list[str] = []
    second = threading.Thread(target=lambda: (run(shared.draw(CIRCLE, FEW)), order.append("second")))
    second.start()
    for _ in first:
        pass
    order.append("first")
    second.join(240)  # against hanging only
    assert order == ["first", "second"]


def test_errors_of_the_work_are_raised_where_it_is_waited_for() -> None:
    def work(emit: Any) -> None:
        emit(1)
        raise InputError("no")

    steps = streamed(work)
    assert next(steps) == 1
    with pytest.raises(InputError, match="no"):
        next(steps)


def test_seeds_fit_and_differ() -> None:
    seeds = {new_seed() for _ in range(5)}
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(seeds) > 1
