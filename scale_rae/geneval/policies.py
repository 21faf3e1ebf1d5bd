"""The summaries of the pictures that each metric keeps, by stored scores. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from scale_rae.errors import InputError
from scale_rae.geneval.folders import PromptFolder, sample_name
from scale_rae.geneval.results import Result
from scale_rae.geneval.summary import Summary, summarise
from scale_rae.ranking import METRICS, REWARD_WEIGHT, Verdicts, rank

Numbers: TypeAlias = Sequence[int]  # of a prompt's pictures
Choice: TypeAlias = Callable[[PromptFolder], Numbers]


@dataclass(frozen=True)
class Policy:
    """A way to choose pictures, which ones of each prompt it takes, in words, and their summary."""

    name: str  # "all", "first", "search", or a metric
    pictures: str
    summary: Summary

    def record(self) -> dict[str, Any]:
        """The policy and its summary as JSON values."""
        return {"policy": self.name, "pictures": self.pictures, **self.summary.record()}


def policies(
    prompts: Sequence[PromptFolder], results: Mapping[str, Result], keep: int | None = None
) -> tuple[list[Policy], dict[str, str]]:
    """The policies of an experiment, and by metric, why it cannot be used.

    They are: all pictures drawn, as many first ones as are kept, those that an adaptive search kept, and by each metric
    those it keeps and the one it ranks first. `results` are by file name. `keep` is the experiment's n_samples unless given.
    """
    found = [Policy("all", "all drawn", summarise(list(results.values())))]
    kept = {prompt.name: _keep(prompt, keep) for prompt in prompts}
    counts = sorted(set(kept.values()))
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if any(kept[p.name] < len(p.samples) for p in prompts):
        found.append(_policy("first", f"first {number} drawn", prompts, results, lambda p: range(kept[p.name])))
    if all(searched(p) for p in prompts):
        found.append(_policy("search", f"{number} kept by the search", prompts, results, searched))
    unusable: dict[str, str] = {}
    for metric in METRICS:
        try:
            orders = {p.name: ranked(p, metric, kept[p.name]) for p in prompts}
        except InputError as e:
            unusable[metric] = str(e)
            continue
        found.append(_policy(metric, f"{number} kept", prompts, results, _first_of(orders, kept)))
        if counts[-1] > 1:
            found.append(_policy(metric, "ranked first", prompts, results, _first_of(orders, dict.fromkeys(kept, 1))))
    return found, unusable


def ranked(
    prompt: PromptFolder, metric: str, at_least: int = 1, first: int | None = None, reward_weight: float = REWARD_WEIGHT
) -> list[int]:
    """The numbers of a prompt's pictures, best first by a metric; `first`: as if only so many were drawn.

    Raises:
        InputError: naming the field, when fewer than `at_least` pictures have what the metric needs.
    """
    count = max((sample.number for sample in prompt.samples), default=-1) + 1
    verdicts = Verdicts.of(prompt.record, count, f"{prompt.folder / 'metadata.jsonl'}: ")
    if first is not None and first < count:
        rewards = verdicts.rewards()
        verdicts = replace(verdicts, count=first, rewards_field=None if rewards is None else rewards[:first])
    return rank(verdicts, metric, reward_weight, at_least=min(at_least, verdicts.count)).order


def chosen(prompts: Sequence[PromptFolder], results: Mapping[str, Result], choice: Choice) -> list[Result]:
    """The results of the pictures that `choice` takes of each prompt, as far as there are any."""
    found = []
    for prompt in prompts:
        by_number = {sample.number: sample for sample in prompt.samples}
        for number in choice(prompt):
            sample = by_number.get(number)
            if sample is not None and (result := results.get(sample_name(prompt, sample))) is not None:
                found.append(result)
    return found


def _policy(
    name: str, pictures: str, prompts: Sequence[PromptFolder], results: Mapping[str, Result], choice: Choice
) -> Policy:
    return Policy(name, pictures, summarise(chosen(prompts, results, choice)))


def _first_of(orders: Mapping[str, Numbers], counts: Mapping[str, int]) -> Choice:
    """Of each prompt, the first pictures of its order, as many as its count."""
    return lambda prompt: orders[prompt.name][: counts[prompt.name]]


def _keep(prompt: PromptFolder, keep: int | None) -> int:
    value = keep if keep is not None else prompt.record.get("n_samples")
    if value is None and isinstance(prompt.record.get("top_ir_indices"), list):  # the official code has no n_samples
        value = len(prompt.record["top_ir_indices"])
    count = len(prompt.samples)
    return min(value, count) if type(value) is int and value > 0 else count


def searched(prompt: PromptFolder) -> Numbers:
    """The pictures that an adaptive search kept, best first; empty where there was no search."""
    kept = prompt.record.get("top_ir_indices") if prompt.record.get("search") == "adaptive" else None
    return [number for number in kept if type(number) is int] if isinstance(kept, list) else []
