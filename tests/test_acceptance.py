"""The rules of adaptive search, on candidates that are made up; each expected fate follows from the rule's sentence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from scale_rae.acceptance import (
    ACCEPTED,
    DROPPED,
    REJECTED,
    REWARD_SPREADS,
    Candidate,
    Look,
    Rules,
    Thresholds,
    accept,
    drop,
    kept,
    next_wave,
    with_wave,
)
from scale_rae.errors import OptionError
from scale_rae.options import REWARDS, SearchOptions

OPTIONS = SearchOptions(check_at=(0.84,), max_candidates=8)


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
    [
        ("", [0, 1, 2, 3, 4]),  # one more than are kept
        ("aard", [4, 5]),
        ("aaaa", []),
        ("rrrrrrd", [7]),
        ("rrrrrrrr", []),
        ("dddaaad", [7]),
        ("dddaaadr", []),  # four are drawn to the end
    ],
)
def test_a_wave_is_as_large_as_what_lacks(fates: str, expected: list[int]) -> None:
    assert next_wave(finished(fates), Rules(4, OPTIONS)) == expected


def test_without_a_look_the_first_wave_has_none_to_drop() -> None:
    assert next_wave([], Rules(4, SearchOptions(max_candidates=8))) == [0, 1, 2, 3]


def test_more_are_kept_than_may_be_begun() -> None:
    """The command line refuses that; the rules draw as many as are kept."""
    assert next_wave([], Rules(9, OPTIONS)) == list(range(9))


def test_no_is_dropped_with_its_time_and_uncertain_is_not() -> None:
    candidates = wave([look("no"), look("uncertain"), look()])
    drop([], candidates, Rules(2, OPTIONS))
    assert [c.fate for c in candidates] == [DROPPED, "", ""]
    assert candidates[0].reason == "the model says no at t = 0.80"


def test_the_standing_is_among_all_candidates_so_far() -> None:
    """Standardised, confidences 10, 10, 10, 6 are 0.577 three times and -1.73; `combined` weighs them 0.8 without rewards."""
    candidates = wave([look(confidence=c) for c in (10, 10, 10, 6)])
    drop([], candidates, Rules(4, OPTIONS))
    assert [c.fate for c in candidates] == ["", "", "", DROPPED]
    assert candidates[3].reason is not None
    assert "1.39 below the mean" in candidates[3].reason
    alone = wave([look(confidence=6)])
    drop([], alone, Rules(1, OPTIONS))
    assert alone[0].fate == ""  # a single candidate is the mean
    later = wave([look(confidence=6)], first=3)
    drop(candidates[:3], later, Rules(4, OPTIONS))
    assert later[0].fate == DROPPED


def test_standings_have_no_scale() -> None:
    """Where the reward has no least spread, as one that is not the package's own."""
    values = [3.0, 2.5, 3.5, -4.0]
    fates = []
    for scale, shift in ((1.0, 0.0), (1e-3, 7.0), (1e4, -1e6)):
        candidates = wave([look(reward=scale * v + shift) for v in values])
        drop([], candidates, Rules(4, OPTIONS, "my own"))
        fates.append([c.fate for c in candidates])
    assert fates == [["", "", "", DROPPED]] * 3


def test_candidates_that_are_nearly_alike_do_not_stand_far_apart() -> None:
    """Rewards 1, 1, 1, -1 have deviation 0.87. Half of (-1.5 over it) is -0.87, but over siglip's least spread of 4, -0.19."""
    rewards = [1.0, 1.0, 1.0, -1.0]
    for name, fate in (("my own", DROPPED), ("imagereward", DROPPED), ("siglip", "")):
        candidates = wave([look(reward=r) for r in rewards])
        drop([], candidates, Rules(4, OPTIONS, name))
        assert [c.fate for c in candidates] == ["", "", "", fate], name
    confidences = wave([look(confidence=c) for c in (10.0, 10.1, 10.2, 9.9)])
    drop([], confidences, Rules(4, OPTIONS))
    assert not any(c.fate for c in confidences)


def test_every_reward_has_a_least_spread() -> None:
    assert REWARD_SPREADS.keys() == set(REWARDS)


def test_no_more_are_drawn_to_the_end_than_are_needed() -> None:
    """Of three that pass, two are to be accepted: the best by answer and standing."""
    candidates = wave([look("uncertain", 10.2), look("yes", 10), look("no", 12), look("yes", 10.1)])
    drop([], candidates, Rules(2, OPTIONS, thresholds=Thresholds(-9, -9)))
    assert [c.fate for c in candidates] == [DROPPED, "", DROPPED, ""]
    assert candidates[0].reason == "others look better at t = 0.80, and no more are needed"
    earlier = finished("a")
    candidates = wave([look(confidence=10), look(confidence=10.1)], first=1)
    drop(earlier, candidates, Rules(2, OPTIONS))
    assert [c.reason for c in candidates] == ["another looks better at t = 0.80, and no more are needed", None]


def test_the_first_of_two_looks_leaves_all_that_pass() -> None:
    rules = Rules(1, SearchOptions(check_at=(0.8, 0.6)))
    candidates = wave([look(confidence=10), look(confidence=10.1)])
    drop([], candidates, rules)
    assert [c.fate for c in candidates] == ["", ""]
    for candidate in candidates:
        candidate.looks.append(look(confidence=10 - candidate.number / 10, t=0.6))
    drop([], candidates, rules)
    assert [c.fate for c in candidates] == ["", DROPPED]


def test_the_best_of_the_dropped_are_revived_when_no_more_may_be_begun() -> None:
    """Six of eight were dropped: two of them are drawn to the end after all, by answer and standing at the last look."""
    candidates = finished("drddrddd")
    seen = [("no", 12), ("yes", 10), ("yes", 9), ("no", 11), ("yes", 10), ("yes", 8), ("yes", 9.5), ("yes", 8)]
    for candidate, (answer, confidence) in zip(candidates, seen, strict=True):
        candidate.looks = [look(answer, confidence)]
        candidate.reason = None if candidate.final else "why"
    rules = Rules(4, OPTIONS)
    assert next_wave(candidates, rules) == [2, 6]
    revived = [candidates[2], candidates[6]]
    for candidate in revived:
        candidate.revive()
        assert (candidate.fate, candidate.reason, candidate.dropped_for) == ("", None, "why")
    drop(candidates, revived, rules)
    assert not any(c.fate for c in revived)  # they have had their look
    revived[0].final, revived[1].final = look("no", t=None), look("yes", t=None)
    accept(candidates, revived, rules)
    assert [c.fate for c in revived] == [REJECTED, ACCEPTED]
    assert with_wave(candidates, revived) == candidates
    assert next_wave(candidates, rules) == []
    assert kept(candidates, rules)[0] == 6
    assert sorted(kept(candidates, rules)) == [1, 2, 4, 6]


def test_only_a_sure_enough_yes_is_accepted_and_the_reason_says_why_not() -> None:
    candidates = wave([look()] * 4)
    for candidate, final in zip(
        candidates,
        [look(t=None), look("no", t=None), look("uncertain", t=None), look(confidence=0.0, t=None)],
        strict=True,
    ):
        candidate.final = final
    accept([], candidates, Rules(4, OPTIONS))
    assert [c.fate for c in candidates] == [ACCEPTED, REJECTED, REJECTED, REJECTED]
    assert [c.reason for c in candidates[:3]] == [None, "the model says no", "the model says neither yes nor no"]


def test_a_threshold_takes_the_place_of_standings() -> None:
    candidates = wave([look(reward=r) for r in (1.0, 1.1, 1.2, -0.5)])
    drop([], candidates, Rules(4, SearchOptions(check_at=(0.84,), accept_reward=-1.0)))
    assert not any(c.fate for c in candidates)
    drop(
        [],
        candidates,
        Rules(4, SearchOptions(check_at=(0.84,), accept_reward=1.05), thresholds=Thresholds(drop_below=5.0)),
    )
    assert [c.fate for c in candidates] == [DROPPED, "", "", DROPPED]
    assert candidates[0].reason == "its reward at t = 0.80 is 1, below 1.05"


def test_accepted_ones_are_kept_first_then_the_best_of_the_rest() -> None:
    candidates = finished("raradr")
    for number, confidence in ((0, 1), (1, 2), (2, 9), (3, 3), (5, 5)):
        candidates[number].final = look(confidence=confidence, t=None)
    assert kept(candidates, Rules(4)) == [3, 1, 2, 5]
    assert kept(candidates, Rules(1)) == [3]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"check_at": (0.9, 0.8, 0.7)}, "--check-at: give one or two times"),
        ({"check_at": (1.5,)}, "--check-at 1.5: must be above 0 and at most 1"),
        ({"check_at": (0.0,)}, "--check-at 0: must be above 0 and at most 1"),
        ({"check_at": (float("nan"),)}, "--check-at nan: must be above 0 and at most 1"),
        ({"check_at": (0.7, 0.8)}, "--check-at 0.7 0.8: must fall"),
        ({"check_at": (0.7, 0.7)}, "--check-at 0.7 0.7: must fall"),
        ({"max_candidates": 0}, "--max-candidates 0: must be at least 1"),
        ({"accept_reward": float("inf")}, "--accept-reward inf: must be a finite number"),
    ],
)
def test_bad_options(options: dict[str, object], error: str) -> None:
    with pytest.raises(OptionError) as found:
        SearchOptions(**options).check()
    assert str(found.value).startswith(error)
