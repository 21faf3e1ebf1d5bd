"""The rules of adaptive search: which candidates of a prompt to begin next, to drop early, to accept, to keep. No torch.

A candidate is one image of a prompt, from its noise on. Candidates are begun in waves: the first has one candidate more than
images are to be kept, so that each has another to be compared with; a later wave has as many as are still to be accepted, as has
the first where no look is possible (a sampler of one step has no half-formed images). At
each look (an early check of the half-formed image) those that will not do are dropped. At the last look, no more are left than
are still to be accepted: the best. They are drawn to the end, and accepted or rejected. When no more may be begun and too few
images are drawn to the end, the best of the dropped candidates are revived: drawn to the end after all. What becomes of a
candidate depends on nothing but its prompt's candidates.

An image's standing is its score by the metric `combined` among its prompt's candidates so far: a weighted sum of standardised
reward and confidences. Differences are in standard deviations of the prompt's candidates, but of at least the reward's or
confidence's least spread: a few candidates that are nearly alike do not stand far apart. Standings need no labels. A candidate
is dropped at a look when the model says no, or its standing is below DROP_BELOW; it is accepted at the end when the model
says yes and its standing is at least ACCEPT_FROM. With `--accept-reward`, that threshold takes the place of both.
docs/scaling.md shows what other thresholds do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scale_rae.options import SearchOptions
from scale_rae.ranking import ANSWERS, Verdicts, number, rank

METRIC = "combined"  # what candidates stand by
DROP_BELOW, ACCEPT_FROM = -0.25, -0.35  # standings; tuned on seeds that no published figure is of
MORE_AT_FIRST = 1  # candidates of the first wave
# Least spreads. Those of confidences and of siglip's logit are about the median standard deviation among a prompt's images of
# the bundled model; half or twice as much changes little. imagereward has deviation 1 over its training set; a difference of 1
# in pickscore is a preference of 73 %. A reward that is not named here has none.
CONFIDENCE_SPREADS = {"yes_conf_score": 4.0, "prompt_conf_score": 1.0}
REWARD_SPREADS = {"siglip": 4.0, "imagereward": 1.0, "pickscore": 1.0}
ACCEPTED, REJECTED, DROPPED = "accepted", "rejected", "dropped"


@dataclass(frozen=True)
class Thresholds:
    """The standings that candidates need; a study may replay records with others."""

    drop_below: float = DROP_BELOW
    accept_from: float = ACCEPT_FROM


DEFAULT_THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Rules:
    """What a search goes by: images to keep, its options, the name of its reward (None: there is none), and thresholds."""

    keep: int
    options: SearchOptions = field(default_factory=SearchOptions)
    reward: str | None = None
    thresholds: Thresholds = DEFAULT_THRESHOLDS

    @property
    def most(self) -> int:
        """Candidates that may be begun."""
        return max(self.keep, self.options.max_candidates)


@dataclass(frozen=True)
class Look:
    """What the model and the reward make of a candidate: early at time t, or at the end (t None)."""

    t: float | None
    judgement: dict[str, Any]  # "answer" and the numbers that METRIC needs
    reward: float | None = None

    def record(self) -> dict[str, Any]:
        """As metadata.jsonl holds an early look."""
        return {"t": self.t, "reward": self.reward, **self.judgement}


@dataclass
class Candidate:
    """One candidate, what was seen of it, and what became of it: its `fate` and, unless it was accepted, the `reason`.

    Of a candidate that was revived, `dropped_for` is the reason for which it had been dropped.
    """

    number: int  # among the prompt's candidates, from 0
    seed: int
    looks: list[Look] = field(default_factory=list)  # early ones
    final: Look | None = None  # of the finished image
    fate: str = ""
    reason: str | None = None
    evaluations: float = 0.0  # of the network, with looks at their cost
    dropped_for: str | None = None

    def __repr__(self) -> str:
        reason = "" if self.reason is None else f": {self.reason}"
        return f"Candidate({self.number}, seed {self.seed}, {self.fate or 'on its way'}{reason})"

    @property
    def is_revived(self) -> bool:
        """Whether it was dropped and then drawn to the end after all."""
        return self.dropped_for is not None

    def revive(self) -> None:
        """Takes a dropped candidate back."""
        self.fate, self.reason, self.dropped_for = "", None, self.reason


def next_wave(candidates: Sequence[Candidate], rules: Rules) -> list[int]:
    """The numbers of the candidates to begin next, or of dropped ones to revive; none when the search is over.

    It is over when enough are accepted, or no more may be begun and enough are drawn to the end.
    """
    lacking = _lacking(candidates, rules)
    if lacking <= 0:
        return []
    begun = len(candidates)
    if begun < rules.most:
        more = MORE_AT_FIRST if not begun and rules.options.check_at else 0
        return list(range(begun, min(begun + lacking + more, rules.most)))
    unfinished = rules.keep - sum(c.final is not None for c in candidates)
    if unfinished <= 0:
        return []
    dropped = _best_at_looks([c for c in candidates if c.fate == DROPPED], candidates, rules)
    return sorted(c.number for c in dropped[:unfinished])


def with_wave(candidates: Sequence[Candidate], wave: Iterable[Candidate]) -> list[Candidate]:
    """The candidates with those of a wave, which take the place of revived ones or come after all others."""
    return list(({c.number: c for c in candidates} | {c.number: c for c in wave}).values())


def drop(earlier: Sequence[Candidate], wave: Sequence[Candidate], rules: Rules) -> None:
    """Sets fate and reason of those candidates of a wave that will not do, after a look at all that are left of it.

    At the last look, it also drops those that pass but are more than are still to be accepted: the best are left.
    """
    left = [c for c in wave if not c.fate and not c.is_revived]
    look = len(left[0].looks) - 1 if left else 0
    standings = _standings_at(look, (*earlier, *wave), rules)
    for candidate in left:
        reason = _why_not(candidate.looks[look], standings[candidate.number], rules.thresholds.drop_below, rules)
        if reason:
            candidate.fate, candidate.reason = DROPPED, reason
    if look + 1 < len(rules.options.check_at):
        return
    passed = _best_at_looks([c for c in left if not c.fate], (*earlier, *wave), rules)
    enough = max(0, _lacking(earlier, rules))
    for candidate in passed[enough:]:
        at = candidate.looks[look].t
        others = "others look better" if enough > 1 else "another looks better"
        candidate.fate, candidate.reason = DROPPED, f"{others} at t = {at:.2f}, and no more are needed"


def accept(earlier: Sequence[Candidate], wave: Sequence[Candidate], rules: Rules) -> None:
    """Sets fate and reason of the candidates of a wave that were drawn to the end."""
    standings = _final_standings((*earlier, *wave), rules)
    for candidate in wave:
        if candidate.final is None:
            continue
        reason = _why_not(candidate.final, standings[candidate.number], rules.thresholds.accept_from, rules)
        if reason is None and candidate.final.judgement["answer"] != "yes":
            reason = "the model says neither yes nor no"
        candidate.fate, candidate.reason = (REJECTED, reason) if reason else (ACCEPTED, None)


def kept(candidates: Sequence[Candidate], rules: Rules) -> list[int]:
    """The numbers of the best finished candidates, best first: the accepted ones, then the best of the rest."""
    standings = _final_standings(candidates, rules)
    finished = [c for c in candidates if c.number in standings]
    finished.sort(key=lambda c: (c.fate != ACCEPTED, _answer(c.final), -standings[c.number], c.number))
    return [c.number for c in finished if c.fate in (ACCEPTED, REJECTED)][: rules.keep]


def _lacking(candidates: Sequence[Candidate], rules: Rules) -> int:
    return rules.keep - sum(c.fate == ACCEPTED for c in candidates)


def _best_at_looks(some: Sequence[Candidate], everyone: Sequence[Candidate], rules: Rules) -> list[Candidate]:
    """Some candidates by answer and standing at the last look at each, best first."""
    standings = [_standings_at(look, everyone, rules) for look in range(len(rules.options.check_at))]

    def place(candidate: Candidate) -> tuple[int, float, int]:
        last = len(candidate.looks) - 1
        return _answer(candidate.looks[last]), -standings[last][candidate.number], candidate.number

    return sorted(some, key=place)


def _answer(look: Look | None) -> int:
    """The place of a look's answer in the order of preference."""
    assert look is not None
    return ANSWERS.index(look.judgement["answer"])


def _standings_at(look: int, candidates: Iterable[Candidate], rules: Rules) -> dict[int, float]:
    """Standings by number, at the early look of that place, of all candidates that had it."""
    return _standings({c.number: c.looks[look] for c in candidates if len(c.looks) > look}, rules)


def _final_standings(candidates: Iterable[Candidate], rules: Rules) -> dict[int, float]:
    """Standings by number of all finished images."""
    return _standings({c.number: c.final for c in candidates if c.final is not None}, rules)


def _standings(looks: dict[int, Look], rules: Rules) -> dict[int, float]:
    if not looks:
        return {}
    rewards = [look.reward for look in looks.values() if look.reward is not None]
    verdicts = Verdicts.made(
        [look.judgement for look in looks.values()], rewards if len(rewards) == len(looks) else None
    )
    spreads = CONFIDENCE_SPREADS | {"reward": REWARD_SPREADS.get(rules.reward or "", 0.0)}
    scores = rank(verdicts, METRIC, spreads=spreads).scores
    return {number: score or 0.0 for number, score in zip(looks, scores, strict=True)}


def _why_not(look: Look, standing: float, least: float, rules: Rules) -> str | None:
    """Why a candidate will not do, None if it will."""
    at = "" if look.t is None else f" at t = {look.t:.2f}"
    if look.judgement["answer"] == "no":
        return f"the model says no{at}"
    floor = rules.options.accept_reward
    if floor is not None:
        if look.reward is not None and look.reward < floor:
            return f"its reward{at} is {number(look.reward)}, below {number(floor)}"
    elif standing < least:
        return f"its combined score{at} is {number(-standing)} below the mean of the prompt's candidates so far"
    return None
