"""Rankings: by each metric, ties, what is missing, and the sentence that says why an image was dropped."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_rae.errors import InputError
from scale_rae.ranking import METRICS, TABLE, Verdicts, formula, metric_named, number, rank, standardised, why_dropped

ANSWER = st.sampled_from(["yes", "no", "uncertain"])
NUMBER = st.one_of(st.floats(-50, 50), st.integers(-2, 2).map(float))  # the integers make ties
SURE = st.one_of(st.floats(0, 20), st.integers(0, 2).map(float))


def said(answer: str, sure: float = 1.0, **more: Any) -> dict[str, Any]:
    conf = {"yes": 0.0, "no": 0.0} | ({answer: sure} if answer != "uncertain" else {})
    return {
        "answer": answer,
        "yes_conf_score": conf["yes"],
        "no_conf_score": conf["no"],
        "yes_logit": conf["yes"] * 2,
        "no_logit": conf["no"] * 2,
        "response_conf_score": sure,
        "prompt_loss": sure,
        "prompt_conf_score": sure,
        "image_conf_score": sure,
        **more,
    }


def verdicts(responses: list[dict[str, Any] | None], rewards: list[Any] | None = None, **more: Any) -> Verdicts:
    metadata = {
        "all_ir_scores": rewards,
        "text_responses": {str(i): r for i, r in enumerate(responses) if r is not None},
        **more,
    }
    return Verdicts.of(metadata, len(responses), "exp/00007/metadata.jsonl: ")


@st.composite
def images(draw: st.DrawFn) -> list[tuple[dict[str, Any], float]]:
    return draw(st.lists(st.tuples(st.builds(said, ANSWER, SURE), NUMBER), min_size=1, max_size=9))


def of(drawn: list[tuple[dict[str, Any], float]]) -> Verdicts:
    return verdicts([r for r, _ in drawn], [reward for _, reward in drawn])


@given(images(), st.sampled_from(METRICS), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.randoms())
def test_the_order_of_drawing_matters_to_ties_alone(
    drawn: list[tuple[dict[str, Any], float]], metric: str, weight: float, rng: Any
) -> None:
    before = rank(of(drawn), metric, weight)
    assert sorted(before.order) == list(range(len(drawn)))
    moved = list(range(len(drawn)))
    rng.shuffle(moved)
    after = rank(of([drawn[i] for i in moved]), metric, weight)
    assert after.scores == [before.scores[i] for i in moved]

    key = [(drawn[i][0]["answer"], before.scores[i]) for i in before.order]
    answered = TABLE[metric].by_answer
    again = [(drawn[moved[i]][0]["answer"], after.scores[i]) for i in after.order]
    assert [k if answered else k[1] for k in again] == [k if answered else k[1] for k in key]


@given(images(), st.sampled_from(METRICS))
def test_ties_go_to_the_lower_index(drawn: list[tuple[dict[str, Any], float]], metric: str) -> None:
    count = len(drawn)
    order = rank(of(drawn + drawn), metric).order
    for i in range(count):
        assert order.index(i) < order.index(i + count)
    assert rank(of([drawn[0]] * 5), metric).order == [0, 1, 2, 3, 4]


@given(images(), st.sampled_from([m for m in METRICS if TABLE[m].by_answer]), st.floats(0, 1))
def test_yes_comes_before_uncertain_before_no(
    drawn: list[tuple[dict[str, Any], float]], metric: str, weight: float
) -> None:
    answers = [drawn[i][0]["answer"] for i in rank(of(drawn), metric, weight).order]
    assert answers == sorted(answers, key=["yes", "uncertain", "no"].index)


@given(images(), st.integers(1, 9))
def test_asking_for_more_images_changes_no_order(drawn: list[tuple[dict[str, Any], float]], keep: int) -> None:
    n = min(keep, len(drawn))
    assert rank(of(drawn), "combined", at_least=n).order == rank(of(drawn), "combined").order


def z(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / spread for v in values]


REWARDS, YES_CONF, PROMPT = [0.0, 2.0, 1.0, 9.0], [8.0, 6.0, 7.0, 0.0], [3.0, 5.0, 1.0, 9.0]


def by_hand(rewards: list[float] | None) -> Verdicts:
    answers = ["yes", "yes", "yes", "no"]
    judged = [said(a, s or 9.0, prompt_conf_score=p) for a, s, p in zip(answers, YES_CONF, PROMPT, strict=True)]
    return verdicts(judged, rewards)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_combined_by_hand(weight: float) -> None:
    ranking = rank(by_hand(REWARDS), "combined", weight)
    expected = [
        weight * r + (1 - weight) * (0.2 * y + 0.8 * p)
        for r, y, p in zip(z(REWARDS), z(YES_CONF), z(PROMPT), strict=True)
    ]
    assert ranking.scores == pytest.approx(expected)
    assert ranking.order == [*sorted(range(3), key=lambda i: -expected[i]), 3]  # a no comes last whatever its score
    assert not ranking.without_reward


def test_combined_without_rewards_by_hand() -> None:
    ranking = rank(by_hand(None), "combined", 0.9)
    assert ranking.scores == pytest.approx([0.2 * y + 0.8 * p for y, p in zip(z(YES_CONF), z(PROMPT), strict=True)])
    assert ranking.without_reward
    assert ranking.order == [1, 0, 2, 3]


def test_combined_v1_by_hand() -> None:
    ranking = rank(by_hand(REWARDS), "combined-v1", 0.25)
    assert ranking.scores == pytest.approx([0.25 * r + 0.75 * c for r, c in zip(z(REWARDS), z(YES_CONF), strict=True)])
    assert ranking.order == [0, 2, 1, 3]
    assert rank(by_hand(REWARDS), "combined_v1", 1.0).order == [1, 2, 0, 3]


def test_formulas() -> None:
    assert formula("combined") == "yes first; 0.5 z(reward) + 0.1 z(yes_conf_score) + 0.4 z(prompt_conf_score)"
    assert formula("combined", 0.3) == "yes first; 0.3 z(reward) + 0.14 z(yes_conf_score) + 0.56 z(prompt_conf_score)"
    assert formula("combined", 0.3, with_reward=False) == "yes first; 0.2 z(yes_conf_score) + 0.8 z(prompt_conf_score)"
    assert formula("combined-v1", 0.3) == "yes first; 0.3 z(reward) + 0.7 z(yes_conf_score)"
    assert formula("combined-v1", with_reward=False) == formula("answer_conf")
    assert formula("answer_logits") == "yes first; yes_logit of a yes, -no_logit of a no"
    assert (formula("image_reward"), formula("loss"), formula("prompt_conf")) == (
        "reward",
        "-prompt_loss",
        "prompt_conf_score",
    )


def test_what_is_equal_on_paper_is_a_tie() -> None:
    assert rank(verdicts([said("yes", 8.3), said("yes", 7.9)], [0.1, 0.7]), "combined").scores == [0.0, 0.0]
    assert rank(verdicts([said("yes", 7.9), said("yes", 8.3)], [0.7, 0.1]), "combined").order == [0, 1]


def test_no_spread_counts_nothing() -> None:
    p = verdicts([said("yes", 3), said("yes", 5)], [0.1, 0.1])
    assert rank(p, "combined", 0.9).order == [1, 0]
    assert standardised([0.1] * 3) == [0.0] * 3
    assert standardised([]) == []
    assert standardised([0.0, 5e-324]) == [0.0, 0.0]  # a spread too small to have a square


def test_without_rewards_combined_v1_goes_by_the_answers_confidence() -> None:
    responses = [said("no", 9), said("yes", 3), said("no", 2), said("uncertain"), said("yes", 5)]
    ranking = rank(verdicts(responses), "combined_v1")
    assert ranking.without_reward
    assert ranking.scores == [-9, 3, -2, 0, 5]
    assert ranking.order == rank(verdicts(responses), "answer_conf").order == [4, 1, 3, 2, 0]


def test_a_lower_loss_is_better() -> None:
    p = verdicts([said("yes", 3), said("no", 1), said("yes", 2)])
    assert rank(p, "prompt_loss").order == [1, 2, 0]
    assert rank(p, "loss").order == [1, 2, 0]
    assert rank(p, "prompt_conf").order == [0, 2, 1]


def test_images_that_were_not_asked_about_come_last() -> None:
    """As in folders of the official code, which asks about the best by reward alone."""
    p = verdicts([None, said("yes", 1), None, said("no", 2), said("yes", 3)], [9.0, 1, 8, 2, 3])
    assert rank(p, "answer_conf", at_least=3).order == [4, 1, 3, 0, 2]
    assert rank(p, "combined", at_least=3).order[2:] == [3, 0, 2]
    assert rank(p, "image_reward").order == [0, 2, 4, 3, 1]
    with pytest.raises(
        InputError, match=r'00007/metadata.jsonl: text_responses\["0"\] is missing; --metric answer_conf'
    ):
        rank(p, "answer_conf", at_least=4)


@pytest.mark.parametrize(
    ("p", "metric", "message"),
    [
        (verdicts([said("yes")]), "image_reward", "all_ir_scores is null; --metric image_reward needs a reward"),
        (verdicts([said("yes")]), "image_reward", "which `scale-rae score DIR --reward NAME` adds"),
        (
            verdicts([said("yes", prompt_conf_score=None)], [1.0]),
            "combined",
            r'text_responses\["0"\].prompt_conf_score is missing; .* \(0 have it\); --metric combined-v1 does without$',
        ),
        (verdicts([said("yes", yes_conf_score=None)], [1.0]), "combined_v1", r"yes_conf_score is missing.*have it\)$"),
        (verdicts([said("yes", yes_conf_score=None)], [1.0]), "combined", r"yes_conf_score is missing.*have it\)$"),
        (verdicts([said("no", no_conf_score=None)]), "combined_v1", "no_conf_score is missing"),
        (verdicts([said("yes")] * 3, [1.0, 2.0]), "combined", "all_ir_scores has 2 values for 3 images"),
        (verdicts([said("yes")], ["high"]), "image_reward", r"all_ir_scores\[0\] is 'high', not a number"),
        (verdicts([said("yes")], [True]), "image_reward", r"all_ir_scores\[0\] is True"),
        (verdicts([said("yes")], [None]), "image_reward", r"all_ir_scores\[0\] is missing"),
        (verdicts([said("yes")], [None]), "combined", r"all_ir_scores\[0\] is null; --metric combined"),
        (verdicts([said("yes")], 3), "image_reward", "all_ir_scores is not a list"),
        (verdicts([None]), "answer_conf", "text_responses is missing"),
        (verdicts([said("yes", prompt_loss=None)]), "loss", r'text_responses\["0"\].prompt_loss is missing'),
        (verdicts([said("yes", prompt_loss="low")]), "loss", r"prompt_loss is 'low', not a number"),
        (verdicts([said("no") | {"answer": "perhaps"}]), "combined", "'perhaps', not one"),
        (verdicts([said("yes") | {"answer": None}]), "answer_conf", r'text_responses\["0"\].answer is missing'),
        (verdicts([said("yes", yes_logit=None)]), "answer_logits", "yes_logit is missing"),
        (verdicts([said("no", no_conf_score=None)]), "answer_conf", "no_conf_score is missing"),
        (verdicts([said("no", yes_conf_score=None)], [1.0]), "combined", "yes_conf_score is missing"),
        (verdicts([None], text_responses=[1]), "combined", "text_responses is not an object"),
        (verdicts([None], text_responses={"0": 1}), "combined", r'text_responses\["0"\] is not an object'),
    ],
)
def test_what_is_missing_is_named(p: Verdicts, metric: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        rank(p, metric)
    assert str(e.value).startswith("exp/00007/metadata.jsonl: ")


def test_names_of_metrics() -> None:
    assert metric_named("loss") == "prompt_loss"
    assert metric_named("Answer-Conf") == "answer_conf"
    with pytest.raises(InputError, match="'best' is not one of combined"):
        metric_named("best")


def judged_so(answers: list[str], confidences: list[float], rewards: list[float] | None = None) -> Verdicts:
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
    assert why(judged_so(["yes", "no"], [2.0, 1.0]), 0) is None


@pytest.mark.parametrize(("answer", "said"), [("no", "the model says no"), ("uncertain", "neither yes nor no")])
def test_an_answer_that_is_not_yes_is_the_reason(answer: str, said: str) -> None:
    text = why(judged_so(["yes", answer], [1.0, 9.0], [1.0, 9.0]), 1)
    assert text is not None
    assert said in text
    assert text.endswith("the last image kept has a yes.")


def test_the_score_and_what_it_is_made_of() -> None:
    text = why(judged_so(["yes", "yes"], [2.0, 1.5], [0.5, -1.25]), 1)
    assert text == (
        "Its combined score of −1 is below the 1 of the last image kept "
        "(reward −1.25 against 0.5, confidence in yes 1.5 against 2, confidence in the prompt 1.5 against 2)."
    )
    text = why(judged_so(["yes", "yes"], [2.0, 1.5]), 1)
    assert text == (
        "Its combined score of −1 is below the 1 of the last image kept "
        "(confidence in yes 1.5 against 2, confidence in the prompt 1.5 against 2)."
    )
    text = why(judged_so(["yes", "yes"], [2.0, 1.5], [0.5, -1.25]), 1, metric="combined_v1")
    assert text == (
        "Its combined score of −1 is below the 1 of the last image kept "
        "(reward −1.25 against 0.5, confidence in yes 1.5 against 2)."
    )


def test_without_a_reward_combined_v1_is_the_confidence() -> None:
    text = why(judged_so(["yes", "yes"], [2.0, 1.5]), 1, metric="combined_v1")
    assert text == "Its confidence of 1.5 is below the 2 of the last image kept."


def test_a_loss_is_above() -> None:
    text = why(judged_so(["yes", "yes"], [1.0, 1.5]), 1, metric="prompt_loss")
    assert text == "Its prompt loss of 1.5 is above the 1 of the last image kept."


def test_of_a_tie_the_image_drawn_earlier_is_kept() -> None:
    text = why(judged_so(["yes", "yes"], [1.0, 1.0]), 1)
    assert text == "Its combined score of 0 is that of the last image kept, which was drawn earlier."


def test_a_missing_score_is_the_reason() -> None:
    shown = dataclasses.replace(judged_so(["yes", "yes"], [1.0, 1.0]), rewards_field=[1.0, None])
    assert why(shown, 1, metric="image_reward") == "It has no reward."


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_words(metric: str) -> None:
    shown = judged_so(["yes", "no", "uncertain", "yes"], [3.0, 1.0, 2.0, 0.5], [3.0, 1.0, 2.0, 0.5])
    ranking = rank(shown, metric)
    for keep in (1, 2, 3):
        for place, image in enumerate(ranking.order):
            text = why_dropped(shown, ranking, keep, metric, image)
            assert (text is None) == (place < keep)
            assert text is None or (text.endswith(".") and "None" not in text)


def test_numbers_have_three_digits_and_a_true_minus() -> None:
    assert [number(v) for v in (-1.0, 0.12345, 12345.0)] == ["−1", "0.123", "1.23e+04"]
