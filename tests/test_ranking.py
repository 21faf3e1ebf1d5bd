"""The sentence that says why an image was dropped."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from scale_rae.ranking import METRICS, Verdicts, number, rank, why_dropped


def prompt(answers: list[str], confidences: list[float], rewards: list[float] | None = None) -> Verdicts:
    responses: dict[str, Any] = {}
    for i, (answer, confidence) in enumerate(zip(answers, confidences, strict=True)):
        responses[str(i)] = {
            "answer": answer,
            **{
                f"{a}_{kind}": confidence if a == answer else 0.0
                for a in ("yes", "no")
                for kind in ("conf_score", "logit")
            },
            **dict.fromkeys(
                ("prompt_loss", "prompt_conf_score", "image_conf_score", "response_conf_score"), confidence
            ),
        }
    return Verdicts(len(answers), responses, rewards)


def why(shown: Verdicts, image: int, keep: int = 1, metric: str = "combined") -> str | None:
    return why_dropped(shown, rank(shown, metric), keep, metric, image)


def test_a_kept_image_needs_no_excuse() -> None:
    assert why(prompt(["yes", "no"], [2.0, 1.0]), 0) is None


@pytest.mark.parametrize(("answer", "said"), [("no", "the model says no"), ("uncertain", "neither yes nor no")])
def test_the_answer(answer: str, said: str) -> None:
    text = why(prompt(["yes", answer], [1.0, 9.0], [1.0, 9.0]), 1)
    assert text is not None
    assert said in text
    assert text.endswith("the last image kept has a yes.")


def test_the_score_and_what_it_is_made_of() -> None:
    text = why(prompt(["yes", "yes"], [2.0, 1.5], [0.5, -1.25]), 1)
    assert text == (
        "Its combined score of −1 is below the 1 of the last image kept "
        "(reward −1.25 against 0.5, confidence in yes 1.5 against 2)."
    )


def test_without_a_reward_it_is_the_confidence() -> None:
    assert why(prompt(["yes", "yes"], [2.0, 1.5]), 1) == "Its confidence of 1.5 is below the 2 of the last image kept."


def test_a_loss_is_above() -> None:
    text = why(prompt(["yes", "yes"], [1.0, 1.5]), 1, metric="prompt_loss")
    assert text == "Its prompt loss of 1.5 is above the 1 of the last image kept."


def test_a_tie() -> None:
    text = why(prompt(["yes", "yes"], [1.0, 1.0]), 1)
    assert text == "Its confidence of 1 is that of the last image kept, which was drawn earlier."


def test_no_score() -> None:
    shown = dataclasses.replace(prompt(["yes", "yes"], [1.0, 1.0]), rewards_field=[1.0, None])
    assert why(shown, 1, metric="image_reward") == "It has no reward."


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_words(metric: str) -> None:
    shown = prompt(["yes", "no", "uncertain", "yes"], [3.0, 1.0, 2.0, 0.5], [3.0, 1.0, 2.0, 0.5])
    ranking = rank(shown, metric)
    for keep in (1, 2, 3):
        for place, image in enumerate(ranking.order):
            text = why_dropped(shown, ranking, keep, metric, image)
            assert (text is None) == (place < keep)
            assert text is None or (text.endswith(".") and "None" not in text)


def test_numbers() -> None:
    assert [number(v) for v in (-1.0, 0.12345, 12345.0)] == ["−1", "0.123", "1.23e+04"]
