"""`scale_rae.search`: candidates of the bundled model are drawn until enough are accepted, each as it would be drawn alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import scale_rae
from scale_rae.acceptance import ACCEPTED, DROPPED, REJECTED
from scale_rae.adaptive import Drawn
from scale_rae.errors import InputError, OptionError
from scale_rae.images import Picture
from scale_rae.noise import image_seed
from scale_rae.options import SamplingOptions, SearchOptions
from scale_rae.results import SearchResult
from tests.cli.conftest import same_bits

SAMPLING = SamplingOptions(steps=6, solver="ab2")
SEARCH = SearchOptions(check_at=(0.9,), max_candidates=4)
CIRCLE = "a photo of a red circle"
CROSS = "a photo of a blue cross and a pink square"
IMPOSSIBLE = "a photo of a yellow ring, a green heart, a red star and a purple cross"  # in so few steps


@pytest.fixture(scope="module")
def model() -> scale_rae.ScaleRAE:
    return scale_rae.load("shapes", device="cpu")


def search(model: scale_rae.ScaleRAE, prompt: str, **options: Any) -> SearchResult:
    return scale_rae.search(model, prompt, **{"options": SAMPLING, "search": SEARCH, "prompt_prefix": "", **options})


class Stub:
    """A reward that scores pictures by their place in its calls."""

    name = "stub"
    range = (0.0, 10.0)
    operations = 0.0

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def score(self, images: Sequence[Picture], prompt: str) -> list[float]:
        self.prompts += [prompt] * len(images)
        return [float(len(self.prompts) - i) for i in range(len(images))]


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, scale_rae; assert 'search' in scale_rae.__all__; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_accepted_image_is_the_one_of_its_seed(model: scale_rae.ScaleRAE) -> None:
    """The first two candidates are dropped, the third is accepted; drawn alone, it has the same bits, as it was alone in its wave."""
    # Any image that the model says yes to.
    options = SearchOptions(check_at=(0.9,), max_candidates=4, accept_reward=-30)
    result = search(model, CROSS, search=options, seed=13)
    (image,) = result.images
    assert image.accepted
    assert image.judgement["answer"] == "yes"
    assert isinstance(image.reward, float)
    fates = [c.fate for c in result.candidates]
    assert fates == [DROPPED] * (len(fates) - 1) + [ACCEPTED]
    assert fates.count(DROPPED)
    assert [c.seed for c in result.candidates] == [image_seed(13, 0, j) for j in range(len(fates))]
    assert result.accepted == 1
    assert result.evaluations == pytest.approx(sum(c.evaluations for c in result.candidates))
    assert set(result.seconds) == {"reply", "sampling", "judging"}
    drawn = model.generate(result.request, image_seeds=[[image.seed]], options=SAMPLING).images[0]
    assert same_bits(drawn.latent, image.latent)
    assert drawn.image is not None
    assert drawn.image.tobytes() == image.image.tobytes()
    assert repr(result).startswith(f"SearchResult('{CROSS}': 1 of 1 image accepted, ")
    assert repr(image).startswith("FoundImage(accepted, yes, reward ")


def test_the_best_fill_up_when_too_few_are_accepted(model: scale_rae.ScaleRAE) -> None:
    result = search(model, IMPOSSIBLE, keep=2, reward=None)
    assert [image.accepted for image in result.images] == [False, False]
    assert [image.reward for image in result.images] == [None, None]
    assert result.accepted == 0
    fates = [c.fate for c in result.candidates]
    assert len(fates) == SEARCH.max_candidates
    assert fates.count(REJECTED) == 2
    assert all(c.reason and "the model says no" in c.reason for c in result.candidates)
    assert [c.is_revived for c in result.candidates] == [fate == REJECTED for fate in fates]
    for c in result.candidates:
        assert c.evaluations == pytest.approx(2.57 + (6 if c.is_revived else 0))  # a look, and once more from noise
    for image in result.images:
        (alone,) = model.generate(result.request, image_seeds=[[image.seed]], options=SAMPLING, decode=False).images
        torch.testing.assert_close(image.latent, alone.latent, atol=1e-4, rtol=0)


def test_several_prompts_are_each_as_they_are_alone(model: scale_rae.ScaleRAE) -> None:
    """In a list, prompt i has the seeds of index i; what becomes of its candidates does not depend on the others.

    Batches differ, so latents agree up to rounding.
    """
    prompts = [CIRCLE, IMPOSSIBLE, "Show me a heart."]
    options: Any = {"options": SAMPLING, "search": SEARCH, "reward": None, "batch_size": 2}
    results = scale_rae.search(model, prompts, **options)
    assert [r.prompt for r in results] == [CIRCLE, IMPOSSIBLE, "a heart"]
    assert [r.request for r in results] == [f"Can you generate {CIRCLE}", f"Can you generate {IMPOSSIBLE}", prompts[2]]
    for i, result in enumerate(results):
        assert [c.seed for c in result.candidates] == [image_seed(42, i, c.number) for c in result.candidates]
        for image in result.images:
            (alone,) = model.generate(result.request, image_seeds=[[image.seed]], options=SAMPLING, decode=False).images
            torch.testing.assert_close(image.latent, alone.latent, atol=1e-4, rtol=0)
    (first,) = scale_rae.search(model, prompts[:1], **options)
    assert [(c.fate, c.reason) for c in first.candidates] == [(c.fate, c.reason) for c in results[0].candidates]


def test_watching_and_a_reward_of_ones_own(model: scale_rae.ScaleRAE) -> None:
    """Each candidate is seen when it is begun, early with a half-formed picture, and at its end."""
    seen: list[tuple[int, str, bool]] = []
    evaluations: list[float] = []

    def watch(drawn: Drawn) -> None:
        seen.append((drawn.candidate.number, drawn.candidate.fate, drawn.picture is not None))

    reward = Stub()
    result = search(
        model,
        f"Can you generate {IMPOSSIBLE}?",
        reward=reward,
        watch=watch,
        search=SearchOptions(check_at=(0.9,), max_candidates=2, save_dropped=True),
        callback=lambda evaluation, evaluations_, t, x, v: evaluations.append(t),
    )
    begun, looked = [(0, "", False), (1, "", False)], [(0, DROPPED, True), (1, DROPPED, True)]
    assert seen == [*begun, *looked, (0, "", False), (0, REJECTED, True)]  # 0 is revived
    assert set(reward.prompts) == {IMPOSSIBLE}  # not the words of the request
    assert list(result.dropped) == [1]
    assert result.images[0].reward == 3.0
    assert 6 < len(evaluations) < 12


def test_a_reply_without_an_image(model: scale_rae.ScaleRAE) -> None:
    result = search(model, "What is the capital of France?", reward=None)
    assert (result.images, result.candidates, result.evaluations) == ([], [], 0)
    assert result.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"keep": 0}, "images to keep 0: must be at least 1"),
        ({"keep": 5}, "--max-candidates 4: must be at least the images to keep, which are 5"),
        ({"search": SearchOptions(check_at=(1.5,))}, "--check-at 1.5: must be above 0 and at most 1"),
        ({"search": SearchOptions(accept_reward=0.5)}, "--accept-reward 0.5: there is no reward"),
        ({"search": SearchOptions(accept_reward=11), "reward": Stub()}, "the reward stub is between 0 and 10"),
        ({"options": SamplingOptions(steps=1)}, "2 to 1000"),
        ({"post_qa_mode": "ear"}, "post qa mode 'ear': use one of latent, image"),
        ({"batch_size": 0}, "batch size 0: must be at least 1"),
    ],
)
def test_options_that_no_search_can_use(model: scale_rae.ScaleRAE, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        search(model, CIRCLE, **{"reward": None, **options})


def test_inputs_that_cannot_be_searched(model: scale_rae.ScaleRAE) -> None:
    with pytest.raises(InputError, match="reward 'taste': no such reward"):
        search(model, CIRCLE, reward="taste")
    with pytest.raises(InputError, match="there is no reward to load from it"):
        search(model, CIRCLE, reward="none", reward_path="/x")
    with pytest.raises(InputError, match="the prompt is empty"):
        search(model, " ", reward=None)
    with pytest.raises(InputError, match=r"the question is .* tokens long"):
        search(model, "a cat " * 2000, reward=None)
