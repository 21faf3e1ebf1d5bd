from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_rae.errors import InputError
from scale_rae.ranking import METRICS, Ranking, metric_named, standardised
from scale_rae.ranking import rank as rank_verdicts
from scale_rae.scaling.select import Experiment, Prompt, renumbered


def rank(prompt: Prompt, *options: Any, **more: Any) -> Ranking:
    return rank_verdicts(prompt.verdicts, *options, **more)


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


def prompt(responses: list[dict[str, Any] | None], rewards: list[Any] | None = None, **more: Any) -> Prompt:
    metadata = {
        "prompt": "p",
        "all_ir_scores": rewards,
        "text_responses": {str(i): r for i, r in enumerate(responses) if r is not None},
        **more,
    }
    return Prompt(Path("exp/00007"), metadata, [Path(f"{i:05}.png") for i in range(len(responses))])


@st.composite
def images(draw: st.DrawFn) -> list[tuple[dict[str, Any], float]]:
    return draw(st.lists(st.tuples(st.builds(said, ANSWER, SURE), NUMBER), min_size=1, max_size=9))


def of(drawn: list[tuple[dict[str, Any], float]]) -> Prompt:
    return prompt([r for r, _ in drawn], [reward for _, reward in drawn])


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
    answered = metric in ("combined", "answer_conf", "answer_logits")
    again = [(drawn[moved[i]][0]["answer"], after.scores[i]) for i in after.order]
    assert [k if answered else k[1] for k in again] == [k if answered else k[1] for k in key]


@given(images(), st.sampled_from(METRICS))
def test_ties_go_to_the_lower_index(drawn: list[tuple[dict[str, Any], float]], metric: str) -> None:
    count = len(drawn)
    order = rank(of(drawn + drawn), metric).order
    for i in range(count):
        assert order.index(i) < order.index(i + count)
    assert rank(of([drawn[0]] * 5), metric).order == [0, 1, 2, 3, 4]


@given(images(), st.sampled_from(["combined", "answer_conf", "answer_logits"]), st.floats(0, 1))
def test_yes_comes_before_uncertain_before_no(
    drawn: list[tuple[dict[str, Any], float]], metric: str, weight: float
) -> None:
    answers = [drawn[i][0]["answer"] for i in rank(of(drawn), metric, weight).order]
    assert answers == sorted(answers, key=["yes", "uncertain", "no"].index)


@given(images(), st.integers(1, 12))
def test_keeping_more_keeps_those_too(drawn: list[tuple[dict[str, Any], float]], keep: int) -> None:
    p = of(drawn)
    n = Experiment(Path("exp"), None, [p]).keep_of(p, keep)
    assert n == min(keep, len(drawn))
    assert rank(p, "combined", at_least=n).order[:n] == rank(p, "combined").order[:n]


def test_combined_by_hand() -> None:
    p = prompt([said("yes", 8), said("yes", 6), said("yes", 7), said("no", 9)], [0.0, 2.0, 1.0, 9.0])
    rewards, sure = [0.0, 2.0, 1.0, 9.0], [8.0, 6.0, 7.0, 0.0]

    def z(values: list[float]) -> list[float]:
        mean = sum(values) / 4
        return [(v - mean) / math.sqrt(sum((w - mean) ** 2 for w in values) / 4) for v in values]

    ranking = rank(p, "combined", 0.25)
    assert ranking.scores == pytest.approx([0.25 * r + 0.75 * c for r, c in zip(z(rewards), z(sure), strict=True)])
    assert ranking.order == [0, 2, 1, 3]
    assert rank(p, "combined", 1.0).order == [1, 2, 0, 3]


def test_what_is_equal_on_paper_is_a_tie() -> None:
    assert rank(prompt([said("yes", 8.3), said("yes", 7.9)], [0.1, 0.7]), "combined").scores == [0.0, 0.0]
    assert rank(prompt([said("yes", 7.9), said("yes", 8.3)], [0.7, 0.1]), "combined").order == [0, 1]


def test_no_spread_counts_nothing() -> None:
    p = prompt([said("yes", 3), said("yes", 5)], [0.1, 0.1])
    assert rank(p, "combined", 0.9).order == [1, 0]
    assert standardised([0.1] * 3) == [0.0] * 3
    assert standardised([]) == []
    assert standardised([0.0, 5e-324]) == [0.0, 0.0]  # a spread too small to have a square


def test_without_rewards_combined_goes_by_confidence() -> None:
    responses = [said("no", 9), said("yes", 3), said("no", 2), said("uncertain"), said("yes", 5)]
    ranking = rank(prompt(responses), "combined")
    assert ranking.without_reward
    assert ranking.order == rank(prompt(responses), "answer_conf").order == [4, 1, 3, 2, 0]


def test_a_lower_loss_is_better() -> None:
    p = prompt([said("yes", 3), said("no", 1), said("yes", 2)])
    assert rank(p, "prompt_loss").order == [1, 2, 0]
    assert rank(p, "loss").order == [1, 2, 0]
    assert rank(p, "prompt_conf").order == [0, 2, 1]


def test_images_that_were_not_asked_about_come_last() -> None:
    """As in folders of the official code, which asks about the best by reward alone."""
    p = prompt([None, said("yes", 1), None, said("no", 2), said("yes", 3)], [9.0, 1, 8, 2, 3])
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
        (prompt([said("yes")]), "image_reward", "all_ir_scores is null; --metric image_reward"),
        (prompt([said("yes")] * 3, [1.0, 2.0]), "combined", "all_ir_scores has 2 values for 3 images"),
        (prompt([said("yes")], ["high"]), "image_reward", r"all_ir_scores\[0\] is 'high', not a number"),
        (prompt([said("yes")], [True]), "image_reward", r"all_ir_scores\[0\] is True"),
        (prompt([said("yes")], [None]), "image_reward", r"all_ir_scores\[0\] is missing"),
        (prompt([said("yes")], [None]), "combined", r"all_ir_scores\[0\] is null; --metric combined"),
        (prompt([said("yes")], 3), "image_reward", "all_ir_scores is not a list"),  # type: ignore[arg-type]
        (prompt([None]), "answer_conf", "text_responses is missing"),
        (prompt([said("yes", prompt_loss=None)]), "loss", r'text_responses\["0"\].prompt_loss is missing'),
        (prompt([said("yes", prompt_loss="low")]), "loss", r"prompt_loss is 'low', not a number"),
        (prompt([said("no") | {"answer": "perhaps"}]), "combined", "'perhaps', not one"),
        (prompt([said("yes") | {"answer": None}]), "answer_conf", r'text_responses\["0"\].answer is missing'),
        (prompt([said("yes", yes_logit=None)]), "answer_logits", "yes_logit is missing"),
        (prompt([said("no", no_conf_score=None)]), "answer_conf", "no_conf_score is missing"),
        (prompt([said("no", yes_conf_score=None)], [1.0]), "combined", "yes_conf_score is missing"),
        (prompt([None], text_responses=[1]), "combined", "text_responses is not an object"),
        (prompt([None], text_responses={"0": 1}), "combined", r'text_responses\["0"\] is not an object'),
    ],
)
def test_what_is_missing_is_named(p: Prompt, metric: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        rank(p, metric)
    assert str(e.value).startswith("exp/00007/metadata.jsonl: ")


def test_names_of_metrics() -> None:
    assert metric_named("loss") == "prompt_loss"
    assert metric_named("Answer-Conf") == "answer_conf"
    with pytest.raises(InputError, match="'best' is not one of combined"):
        metric_named("best")


def test_how_many_to_keep() -> None:
    p = prompt([said("yes")] * 6, top_ir_indices=[3, 1])
    assert Experiment(Path("exp"), 4, [p]).keep_of(p) == 4
    assert Experiment(Path("exp"), 4, [p]).keep_of(p, 5) == 5
    assert Experiment(Path("exp"), None, [p]).keep_of(p) == 2
    assert Experiment(Path("exp"), None, [p]).keep_of(prompt([said("yes")] * 6, n_samples=3)) == 3
    with pytest.raises(InputError, match="--keep N"):
        Experiment(Path("exp"), None, [p]).keep_of(prompt([said("yes")] * 6))
    with pytest.raises(InputError, match="n_samples is 'four'"):
        Experiment(Path("exp"), None, [p]).keep_of(prompt([said("yes")], n_samples="four"))


def test_renumbered() -> None:
    old = {
        "tag": "x",
        "image_seeds": [10, 11, 12],
        "all_ir_scores": [0.1, 0.2, 0.3],
        "top_ir_indices": [2, 1],
        "top_ir_scores": [0.3, 0.2],
        "text_responses": {"0": "a", "2": "c"},
    }
    new = renumbered(old, [2, 0])
    assert new == {
        "tag": "x",
        "image_seeds": [12, 10],
        "all_ir_scores": [0.3, 0.1],
        "top_ir_indices": [0],
        "top_ir_scores": [0.3],
        "text_responses": {"0": "c", "1": "a"},
        "original_indices": [2, 0],
    }
    assert renumbered(new, [1])["original_indices"] == [0]  # from a selection: still as they were drawn
    assert renumbered({"all_ir_scores": None}, [1]) == {"all_ir_scores": None, "original_indices": [1]}
