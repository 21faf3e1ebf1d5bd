"""The analysis half of scaling_study.py: what each metric would have kept of the first 4, 8, 12 or 32 images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scale_rae.errors import InputError
from scale_rae.ranking import METRICS, TABLE, Verdicts, rank

MODES = ("latent", "image")
NEED_REWARD = tuple(name for name, metric in TABLE.items() if metric.uses_reward)
JUDGE = "the judge itself"  # no choice can do better
RESAMPLES = 4000

WORDS = {"y": "yes", "n": "no", "u": "uncertain"}  # the model's answers by the letters that records hold

Floats = NDArray[np.float64]


def letters(answers: Iterable[str]) -> str:
    """The model's answers as one letter each."""
    return "".join({"yes": "y", "no": "n"}.get(answer, "u") for answer in answers)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON Lines file. A last line without its end is left out: the study was stopped while writing it."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@dataclass(frozen=True)
class Choice:
    """A way to choose: a metric on the model's answers in one mode, with a reward if the metric needs one."""

    metric: str
    mode: str = "latent"
    reward: str | None = None

    def __str__(self) -> str:
        return (
            self.metric + (f", {self.reward}" if self.reward else "") + (", image mode" if self.mode == "image" else "")
        )


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return "–" if self.value is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def choices(lines: Sequence[dict[str, Any]]) -> list[Choice]:
    """Every metric on every mode and reward that the results hold."""
    rewards = list(next((line["rewards"] for line in lines if "rewards" in line), {}))
    found = []
    for mode in MODES:
        for metric in METRICS:
            if TABLE[metric].needs_reward and mode == "image":
                continue  # does not depend on the model's answers
            found += [Choice(metric, mode, r) for r in (rewards if metric in NEED_REWARD else [None])]
    return found


def order(line: dict[str, Any], choice: Choice, count: int) -> list[int]:
    """The first `count` images of a prompt as `scale-rae select` would rank them, best first."""
    columns = line[choice.mode]
    responses = {
        str(i): {name: WORDS[column[i]] if name == "answer" else column[i] for name, column in columns.items()}
        for i in range(count)
    }
    rewards = line["rewards"][choice.reward][:count] if choice.reward else None
    return rank(Verdicts(count, responses, rewards), choice.metric).order


def kept_correct(lines: Sequence[dict[str, Any]], choice: Choice | None, count: int, keep: int) -> Floats:
    """[P] share of correct images among the `keep` best of each prompt's first `count`; None: the judge chooses."""
    shares = np.zeros(len(lines))
    for p, line in enumerate(lines):
        if "failed" in line:
            continue  # no images, so none is correct
        right = [mark == "1" for mark in line["correct"][:count]]
        best = sorted(range(count), key=lambda i: not right[i]) if choice is None else order(line, choice, count)
        shares[p] = np.mean([right[i] for i in best[:keep]])
    return shares


def drawn_correct(lines: Sequence[dict[str, Any]], count: int) -> Floats:
    """[P] share of correct images among each prompt's first `count`."""
    return np.array([np.mean([mark == "1" for mark in line.get("correct", "0")[:count]]) for line in lines])


class Bootstrap:
    """Resamples of P prompts, the same for every figure."""

    def __init__(self, prompts: int) -> None:
        rng = np.random.default_rng(0)
        self._weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts  # [B, P]

    def share(self, values: Floats) -> Estimate:
        """Mean of values [P]."""
        return _estimate(float(values.mean()), self._weights @ values)

    def removed(self, kept: Floats, drawn: Floats) -> Estimate:
        """1 - (wrong among the kept) / (wrong among all drawn), from shares [P] that are correct."""
        wrong = 1 - drawn.mean()
        if wrong <= 0:
            return Estimate(None, None, None)
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled = 1 - (1 - self._weights @ kept) / (1 - self._weights @ drawn)
        return _estimate(float(1 - (1 - kept.mean()) / wrong), resampled[np.isfinite(resampled)])


def _estimate(value: float, resampled: Floats) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _without_folder(part: Any) -> Any:
    """A model's description with the last part of its folder only, since figures are published."""
    if isinstance(part, dict) and Path(str(part.get("name", ""))).is_absolute():
        return part | {"name": Path(part["name"]).name}
    return part


def analyse(path: Path) -> dict[str, Any]:
    """All figures of a results file.

    Raises:
        InputError: when there is no such file or it holds no results.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; --only draw writes it")
    first, *lines = read_lines(path) or [{}]
    if "study" not in first or not lines:
        raise InputError(f"{path}: holds no results of a scaling study")
    study, settings = first["study"], first["study"]["settings"]
    keep, most = settings["n_samples"], settings["scaling_rounds"]
    bootstrap = Bootstrap(len(lines))
    rounds = {}
    for r in sorted({1, 2, 3, most} - set(range(most + 1, 4))):
        drawn = drawn_correct(lines, keep * r)
        chosen: dict[str, Any] = {}
        for choice in (*choices(lines), None):
            kept = kept_correct(lines, choice, keep * r, keep)
            chosen[str(choice or JUDGE)] = {
                "kept": bootstrap.share(kept).__dict__,
                "errors_removed": bootstrap.removed(kept, drawn).__dict__,
                "first": bootstrap.share(kept_correct(lines, choice, keep * r, 1)).__dict__,
                "kinds": {kind: float(kept[which].mean()) for kind, which in _kinds(lines).items()},
            }
        kinds = {kind: float(drawn[which].mean()) for kind, which in _kinds(lines).items()}
        rounds[f"{keep}x{r}"] = {"drawn": bootstrap.share(drawn).__dict__ | {"kinds": kinds}, "chosen": chosen}
    return {
        "study": {name: _without_folder(part) for name, part in study.items()},
        "prompts": len(lines),
        "images": sum(len(line.get("correct", "")) for line in lines),
        "failed": sum("failed" in line for line in lines),
        "rounds": rounds,
        "prompts_by_correct": prompts_by_correct(lines),
        "answers": {mode: answers(lines, mode) for mode in MODES},
        "seconds": seconds(lines, study["workers"]),
    }


def prompts_by_correct(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many prompts have none, up to half, most, or all of their images correct."""
    shares = [line.get("correct", "0").count("1") / len(line.get("correct", "0")) for line in lines]
    return {
        "none": sum(share == 0 for share in shares),
        "up to half": sum(0 < share <= 0.5 for share in shares),
        "most": sum(0.5 < share < 1 for share in shares),
        "all": sum(share == 1 for share in shares),
    }


def _kinds(lines: Sequence[dict[str, Any]]) -> dict[str, NDArray[np.bool_]]:
    tags = list(dict.fromkeys(line["tag"] for line in lines))
    return {tag: np.array([line["tag"] == tag for line in lines]) for tag in tags}


def answers(lines: Sequence[dict[str, Any]], mode: str) -> dict[str, Any]:
    """How often the model says yes to right and to wrong images, per kind and overall."""
    found: dict[str, Any] = {}
    for kind, which in (*_kinds(lines).items(), ("overall", np.ones(len(lines), bool))):
        pairs = [
            pair
            for line, chosen in zip(lines, which, strict=True)
            if chosen and "failed" not in line
            for pair in zip(line["correct"], line[mode]["answer"], strict=True)
        ]
        right = [answer == "y" for correct, answer in pairs if correct == "1"]
        wrong = [answer == "y" for correct, answer in pairs if correct == "0"]
        found[kind] = {"right": len(right), "yes_to_right": sum(right), "wrong": len(wrong), "yes_to_wrong": sum(wrong)}
    return found


def seconds(lines: Sequence[dict[str, Any]], workers: int) -> dict[str, float]:
    """Seconds per prompt, total and in each stage, over the number of workers: means over prompts drawn in one run."""
    timed = [line["seconds"] for line in lines if "total" in line.get("seconds", {})]
    stages = dict.fromkeys(name for times in timed for name in times)
    found = {stage: float(np.mean([times.get(stage, 0.0) for times in timed])) for stage in stages}
    return {stage: value / (1 if stage == "encoding" else workers) for stage, value in found.items()}
