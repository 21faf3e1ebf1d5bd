"""The rules of adaptive search, on candidates that are made up; each expected fate follows from the rule's sentence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from scale_rae.acceptance import ACCEPTED, DROPPED, REJECTED, Candidate, Look, Thresholds, accept, drop, kept, next_wave
from scale_rae.errors import OptionError
from scale_rae.options import SearchOptions

OPTIONS = SearchOptions(max_candidates=8)


def look(answer: str = "yes", confidence: float = 10.0, reward: float | None = None, t: float | None = 0.8) -> Look:
    return Look(t, {"answer": answer, "yes_conf_score": 5.0, "prompt_conf_score": confidence}, reward)


def wave(looks: Sequence[Look], first: int = 0) -> list[Candidate]:
    return [Candidate(first + i, 100 + first + i, [one]) for i, one in enumerate(looks)]


def finished(fates: str) -> list[Candidate]:
    names = {"a": ACCEPTED, "r": REJECTED, "d": DROPPED}
    made = [Candidate(i, i, fate=names[letter]) for i, letter in enumerate(fates)]
    for candidate in made:
        candidate.final = None if candidate.fate == DROPPED else look(t=None)
    return made


@pytest.mark.parametrize(
    ("fates", "expected"),
    [("", [0, 1, 2, 3]), ("aard", [4, 5]), ("aaaa", []), ("rrrrrrd", [7]), ("rrrrrrrr", []), ("dddaaad", [7])],
)
def test_a_wave_is_as_large_as_what_lacks(fates: str, expected: list[int]) -> None:
    assert next_wave(finished(fates), 4, OPTIONS) == expected


def test_more_are_kept_than_may_be_begun() -> None:
    """The command line refuses that; the rules draw as many as are kept."""
    assert next_wave([], 9, OPTIONS) == list(range(9))


def test_no_is_dropped_with_its_time_and_uncertain_is_not() -> None:
    candidates = wave([look("no"), look("uncertain"), look()])
    drop([], candidates, 1, OPTIONS)
    assert [c.fate for c in candidates] == [DROPPED, "", ""]
    assert candidates[0].reason == "the model says no at t = 0.80"


def test_the_standing_is_among_all_candidates_so_far() -> None:
    """Standardised, confidences 10, 10, 10, 6 are 0.577 three times and -1.73; `combined` weighs them 0.8 without rewards."""
    candidates = wave([look(confidence=c) for c in (10, 10, 10, 6)])
    drop([], candidates, 4, OPTIONS)
    assert [c.fate for c in candidates] == ["", "", "", DROPPED]
    assert candidates[3].reason is not None
    assert "1.39 below the mean" in candidates[3].reason
    alone = wave([look(confidence=6)])
    drop([], alone, 1, OPTIONS)
    assert alone[0].fate == ""  # a single candidate is the mean
    later = wave([look(confidence=6)], first=3)
    drop(candidates[:3], later, 4, OPTIONS)
    assert later[0].fate == DROPPED


def test_standings_have_no_scale() -> None:
    values = [3.0, 2.5, 3.5, -4.0]
    fates = []
    for scale, shift in ((1.0, 0.0), (1e-3, 7.0), (1e4, -1e6)):
        candidates = wave([look(reward=scale * v + shift) for v in values])
        drop([], candidates, 1, OPTIONS)
        fates.append([c.fate for c in candidates])
    assert fates == [["", "", "", DROPPED]] * 3


def test_enough_are_drawn_to_the_end() -> None:
    """Of the last three candidates two are needed: the best by answer and standing are not dropped."""
    candidates = wave([look("no", 12), look("yes", 1), look("no", 11)], first=5)
    earlier = finished("ddddd")
    for candidate in earlier:
        candidate.looks = [look()]
    drop(earlier, candidates, 2, OPTIONS)
    assert [c.fate for c in candidates] == ["", "", DROPPED]


def test_accepting() -> None:
    candidates = wave([look()] * 4)
    for candidate, final in zip(
        candidates,
        [look(t=None), look("no", t=None), look("uncertain", t=None), look(confidence=0.0, t=None)],
        strict=True,
    ):
        candidate.final = final
    accept([], candidates, OPTIONS)
    assert [c.fate for c in candidates] == [ACCEPTED, REJECTED, REJECTED, REJECTED]
    assert [c.reason for c in candidates[:3]] == [None, "the model says no", "the model says neither yes nor no"]


def test_a_threshold_takes_the_place_of_standings() -> None:
    candidates = wave([look(reward=r) for r in (1.0, 1.1, 1.2, -0.5)])
    options = SearchOptions(accept_reward=-1.0)
    drop([], candidates, 1, options)
    assert not any(c.fate for c in candidates)
    options = SearchOptions(accept_reward=1.05)
    drop([], candidates, 1, options, Thresholds(drop_below=5.0))
    assert [c.fate for c in candidates] == [DROPPED, "", "", DROPPED]
    assert candidates[0].reason == "its reward at t = 0.80 is 1, below 1.05"


def test_accepted_ones_are_kept_first_then_the_best_of_the_rest() -> None:
    candidates = finished("raradr")
    for number, confidence in ((0, 1), (1, 2), (2, 9), (3, 3), (5, 5)):
        candidates[number].final = look(confidence=confidence, t=None)
    assert kept(candidates, 4) == [3, 1, 2, 5]
    assert kept(candidates, 1) == [3]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"check_at": ()}, "--check-at: give one or two times"),
        ({"check_at": (0.9, 0.8, 0.7)}, "--check-at: give one or two times"),
        ({"check_at": (1.0,)}, "--check-at 1: must be between 0 and 1"),
        ({"check_at": (0.0,)}, "--check-at 0: must be between 0 and 1"),
        ({"check_at": (float("nan"),)}, "--check-at nan: must be between 0 and 1"),
        ({"check_at": (0.7, 0.8)}, "--check-at 0.7 0.8: must fall"),
        ({"check_at": (0.7, 0.7)}, "--check-at 0.7 0.7: must fall"),
        ({"max_candidates": 0}, "--max-candidates 0: must be at least 1"),
        ({"accept_reward": float("inf")}, "--accept-reward inf: must be a finite number"),
    ],
)
def test_bad_options(options: dict[str, object], error: str) -> None:
    with pytest.raises(OptionError) as found:
        SearchOptions(**options).check()  # type: ignore[arg-type]
    assert str(found.value).startswith(error)
