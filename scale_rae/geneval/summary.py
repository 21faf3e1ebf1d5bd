"""GenEval's summary of results, with intervals; paired differences between two sets of results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scale_rae.geneval.results import Result
from scale_rae.shares import Share

RESAMPLES = 4000
_SEED = 0
OVERALL = "overall"

Sums: TypeAlias = NDArray[np.float64]  # [..., 2]: right, all


@dataclass(frozen=True)
class Summary:
    """How many pictures are right, by GenEval's rules.

    `tags` are the kinds of prompts in the order of their first appearance; `overall` is the plain mean of their shares.
    `overall_interval` is its 95 % bootstrap interval: prompts are drawn anew within each kind, since pictures of one prompt are
    alike.
    """

    images: Share
    prompts: Share  # prompts with any picture that is right
    tags: dict[str, Share]
    overall: float
    overall_interval: tuple[float, float]

    def record(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {
            "images": self.images.record(),
            "prompts_with_any": self.prompts.record(),
            "tags": {tag: share.record() for tag, share in self.tags.items()},
            OVERALL: {"score": self.overall, "interval": [round(x, 6) for x in self.overall_interval]},
        }


def summarise(results: Sequence[Result]) -> Summary:
    """The summary of results. Prompts are told apart by their metadata's text, as the original does."""
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for result in results:
        tags.setdefault(result.tag, []).append(result.correct)
        prompts[result.metadata] = prompts.get(result.metadata, False) or result.correct
    shares = {tag: _share(found) for tag, found in tags.items()}
    overall = sum(share.value for share in shares.values()) / len(shares) if shares else 0.0
    by_tag = [_sums(results, tag, lambda result: result.metadata) for tag in shares]
    samples = (
        np.mean([_resampled(sums, number) for number, sums in enumerate(by_tag)], axis=0) if by_tag else np.zeros(1)
    )
    return Summary(
        _share(result.correct for result in results), _share(prompts.values()), shares, overall, _interval(samples)
    )


@dataclass(frozen=True)
class Difference:
    """A number of two sets of results, and the 95 % bootstrap interval of here - there."""

    here: float
    there: float
    interval: tuple[float, float]

    @property
    def difference(self) -> float:
        """The first set's number minus the second's."""
        return self.here - self.there

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.interval[0] > 0 or self.interval[1] < 0

    def record(self) -> dict[str, Any]:
        """The difference as JSON values."""
        interval = [round(x, 6) for x in self.interval]
        return {"here": self.here, "there": self.there, "difference": self.difference, "interval": interval}


@dataclass(frozen=True)
class Comparison:
    """Two sets of results on the prompts that both have.

    `rows`: the kinds of prompts, "images", "prompts_with_any", "overall".
    """

    rows: dict[str, Difference]
    prompts: int
    only_here: int  # prompts
    only_there: int

    def record(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "prompts": self.prompts,
            "only_here": self.only_here,
            "only_there": self.only_there,
            "differences": {name: row.record() for name, row in self.rows.items()},
        }


def compare(here: Sequence[Result], there: Sequence[Result]) -> Comparison:
    """Paired differences of two sets of results.

    The bootstrap draws prompts anew within each kind, the same ones for both sets; its seed is fixed. Prompts are
    paired by GenEval's clauses and their text (`Result.prompt_key`), whatever their number of pictures.
    """
    keys_here, keys_there = ({result.prompt_key for result in results} for results in (here, there))
    common = keys_here & keys_there
    both = [[result for result in results if result.prompt_key in common] for results in (here, there)]
    order = list(dict.fromkeys(result.tag for result in both[0]))
    rows: dict[str, Difference] = {}
    means: list[list[NDArray[np.float64]]] = [[], []]  # per set, per kind
    pooled: list[list[NDArray[np.float64]]] = [[], []]
    any_pooled: list[list[NDArray[np.float64]]] = [[], []]
    summaries = [summarise(results) for results in both]
    for number, tag in enumerate(order):
        for side, results in enumerate(both):
            sums = _sums(results, tag, lambda result: result.prompt_key, order_of=both[0])
            drawn = _counts(number, len(sums)) @ sums
            means[side].append(drawn[:, 0] / np.maximum(drawn[:, 1], 1))
            pooled[side].append(drawn)
            is_any = np.stack([sums[:, 0] > 0, np.ones(len(sums))], axis=1)
            any_pooled[side].append(_counts(number, len(sums)) @ is_any)
        shares = [s.tags[tag].value if tag in s.tags else 0.0 for s in summaries]
        rows[tag] = Difference(shares[0], shares[1], _interval(means[0][-1] - means[1][-1]))
    if order:
        for name, drawn_by, values in (
            ("images", pooled, [s.images.value for s in summaries]),
            ("prompts_with_any", any_pooled, [s.prompts.value for s in summaries]),
        ):
            ratios = [(total := np.sum(drawn, axis=0))[:, 0] / np.maximum(total[:, 1], 1) for drawn in drawn_by]
            rows[name] = Difference(values[0], values[1], _interval(ratios[0] - ratios[1]))
        difference = np.mean(means[0], axis=0) - np.mean(means[1], axis=0)
        rows[OVERALL] = Difference(summaries[0].overall, summaries[1].overall, _interval(difference))
    return Comparison(rows, len(common), len(keys_here - common), len(keys_there - common))


def _share(right: Iterable[bool]) -> Share:
    found = list(right)
    return Share(sum(found), len(found))


def _sums(
    results: Sequence[Result], tag: str, key: Callable[[Result], str], order_of: Sequence[Result] | None = None
) -> Sums:
    """How many pictures of each prompt of a kind are right, and how many there are: [prompts, 2].

    Prompts are in the order of their first appearance, in `order_of` if given.
    """
    sums = {key(result): [0.0, 0.0] for result in order_of or results if result.tag == tag}
    for result in results:
        if (prompt := sums.get(key(result))) is not None and result.tag == tag:
            prompt[0] += result.correct
            prompt[1] += 1
    return np.array(list(sums.values()))


def _resampled(sums: Sums, number: int) -> NDArray[np.float64]:
    """The share of right pictures of a kind in each resample, [RESAMPLES]."""
    drawn = _counts(number, len(sums)) @ sums
    share: NDArray[np.float64] = drawn[:, 0] / np.maximum(drawn[:, 1], 1)
    return share


@functools.lru_cache(maxsize=32)
def _counts(number: int, prompts: int) -> NDArray[np.float64]:
    """How often each of `prompts` is drawn per resample [RESAMPLES, prompts]; `number` is in the seed."""
    rng = np.random.default_rng([_SEED, number])
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES).astype(np.float64)


def _interval(samples: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
