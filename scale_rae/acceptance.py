"""The rules of adaptive search: which candidates of a prompt to begin next, to drop early, to accept, to keep. No torch.

A candidate is one image of a prompt, from its noise on. Candidates are begun in waves. At each look (an early check of the
half-formed image) those that will not do are dropped; the others are drawn to the end, and accepted or rejected. A wave is
as large as the number of images that are still to be accepted, so no candidate is begun that drawing one after the other
would not begin. What becomes of a candidate depends on nothing but its prompt's candidates.

An image's standing is its score by the metric `combined` among its prompt's candidates so far: a weighted sum of
standardised reward and confidences, in standard deviations. Standings need no labels, and no scale of a reward. A candidate
is dropped at a look when the model says no, or its standing is below DROP_BELOW; it is accepted at the end when the model
says yes and its standing is at least ACCEPT_FROM. With `--accept-reward`, that threshold takes the place of both.
docs/scaling.md shows what other thresholds do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scale_rae.options import SearchOptions
from scale_rae.ranking import Verdicts, number, rank

METRIC = "combined"  # what candidates stand by
DROP_BELOW, ACCEPT_FROM = -0.3, -0.7  # standings; tuned on seeds that no published figure is of
ACCEPTED, REJECTED, DROPPED = "accepted", "rejected", "dropped"


@dataclass(frozen=True)
class Thresholds:
    """The standings that candidates need; a study may replay records with others."""

    drop_below: float = DROP_BELOW
    accept_from: float = ACCEPT_FROM


DEFAULT_THRESHOLDS = Thresholds()


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
    """One candidate, what was seen of it, and what became of it: its `fate` and, unless it was accepted, the `reason`."""

    number: int  # among the prompt's candidates, from 0
    seed: int
    looks: list[Look] = field(default_factory=list)  # early ones
    final: Look | None = None  # of the finished image
    fate: str = ""
    reason: str | None = None
    evaluations: float = 0.0  # of the network, with looks at their cost


def next_wave(candidates: Sequence[Candidate], keep: int, options: SearchOptions) -> list[int]:
    """The numbers of the candidates to begin next; none when `keep` are accepted or no more may be begun."""
    lacking = keep - sum(c.fate == ACCEPTED for c in candidates)
    return list(range(len(candidates), min(len(candidates) + max(0, lacking), _most(keep, options))))


def _most(keep: int, options: SearchOptions) -> int:
    return max(keep, options.max_candidates)


def drop(
    earlier: Sequence[Candidate],
    wave: Sequence[Candidate],
    keep: int,
    options: SearchOptions,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> None:
    """Sets fate and reason of those candidates of a wave that will not do, after a look at all that are left of it.

    At least `keep` images are drawn to the end: where too few candidates are left for that, the best are not dropped.
    """
    left = [c for c in wave if not c.fate]
    look = len(left[0].looks) - 1 if left else 0
    seen = [c for c in (*earlier, *wave) if len(c.looks) > look]
    standings = dict(zip((c.number for c in seen), _standings([c.looks[look] for c in seen]), strict=True))
    reasons = {c.number: _why_not(c.looks[look], standings[c.number], thresholds.drop_below, options) for c in left}
    doomed = [c for c in left if reasons[c.number]]
    doomed.sort(key=lambda c: (c.looks[look].judgement["answer"] == "no", -standings[c.number], c.number))
    to_begin = _most(keep, options) - len(earlier) - len(wave)
    finished = sum(c.final is not None for c in earlier)
    needed = max(0, keep - finished - to_begin - (len(left) - len(doomed)))
    for candidate in doomed[needed:]:
        candidate.fate, candidate.reason = DROPPED, reasons[candidate.number]


def accept(
    earlier: Sequence[Candidate],
    wave: Sequence[Candidate],
    options: SearchOptions,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> None:
    """Sets fate and reason of the candidates of a wave that were drawn to the end."""
    finished = [(c, c.final) for c in (*earlier, *wave) if c.final is not None]
    standings = _standings([final for _, final in finished])
    new = {c.number for c in wave}
    for (candidate, final), standing in zip(finished, standings, strict=True):
        if candidate.number in new:
            reason = _why_not(final, standing, thresholds.accept_from, options)
            if reason is None and final.judgement["answer"] != "yes":
                reason = "the model says neither yes nor no"
            candidate.fate, candidate.reason = (REJECTED, reason) if reason else (ACCEPTED, None)


def kept(candidates: Sequence[Candidate], keep: int) -> list[int]:
    """The numbers of the `keep` best finished candidates, best first: the accepted ones, then the best of the rest."""
    accepted = [c for c in candidates if c.fate == ACCEPTED]
    rest = [c for c in candidates if c.fate == REJECTED]
    return [*_ranked(accepted), *_ranked(rest)][:keep]


def _ranked(candidates: Sequence[Candidate]) -> list[int]:
    if not candidates:
        return []
    order = rank(_verdicts(c.final for c in candidates if c.final is not None), METRIC).order
    return [candidates[i].number for i in order]


def _standings(looks: Sequence[Look]) -> list[float]:
    if not looks:
        return []
    return [score or 0.0 for score in rank(_verdicts(looks), METRIC).scores]


def _verdicts(looks: Iterable[Look]) -> Verdicts:
    seen = list(looks)
    rewards = [look.reward for look in seen if look.reward is not None]
    return Verdicts.made([look.judgement for look in seen], rewards if len(rewards) == len(seen) else None)


def _why_not(look: Look, standing: float, least: float, options: SearchOptions) -> str | None:
    """Why a candidate will not do, None if it will."""
    at = "" if look.t is None else f" at t = {look.t:.2f}"
    if look.judgement["answer"] == "no":
        return f"the model says no{at}"
    floor = options.accept_reward
    if floor is not None:
        if look.reward is not None and look.reward < floor:
            return f"its reward{at} is {number(look.reward)}, below {number(floor)}"
    elif standing < least:
        return f"its combined score{at} is {number(-standing)} below the mean of the prompt's candidates so far"
    return None
