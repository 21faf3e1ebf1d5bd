"""One HTML page of an experiment: every prompt's images, best first, and plots of their scores.

The page contains everything it shows. The orders are computed here; the page's few lines of JavaScript only switch between
them.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_rae.errors import InputError
from scale_rae.geneval.results import Result, results_beside
from scale_rae.ranking import METRICS, TABLE
from scale_rae.scaling.plots import best_of_n_plots, histogram, scatter
from scale_rae.scaling.reader import FATES, Experiment, Prompt, Searched, Tried, read_experiment
from scale_rae.scaling.replacing import write_file
from scale_rae.scaling.select import Selection, choose, formula_of, yes_share
from scale_rae.templates import fill_template

MISSING = "–"  # in place of a number that an image does not have
SMALL = 72  # longest side of a candidate's picture, in pixels


def write_report(
    folder: Path, output: Path | None, metric: str | None, keep: int | None, reward_weight: float, thumbnail: int
) -> tuple[Path, Experiment]:
    """The path of the page, once it is written, and the experiment.

    By default the path is `<folder>_report.html`, and the metric that is shown first is the first that can be used.
    `thumbnail` is the longest side of an image on the page, in pixels.

    Raises:
        InputError: when the folder is no experiment, or neither `metric` nor, without it, any metric can rank it.
        OutputError: when the page cannot be written.
    """
    experiment = read_experiment(folder)
    chosen, unusable = usable_metrics(experiment, metric, keep, reward_weight)
    target = output or experiment.folder.with_name(experiment.folder.name + "_report.html")
    found = results_beside(experiment.folder)
    page = render(experiment, chosen, unusable, metric or next(iter(chosen)), reward_weight, thumbnail, found)
    write_file(target, page.encode("utf-8", "replace"), experiment.folder)
    return target, experiment


def usable_metrics(
    experiment: Experiment, metric: str | None, keep: int | None, reward_weight: float
) -> tuple[dict[str, list[Selection]], dict[str, str]]:
    """The selections by each metric that can be used, and why each of the remaining metrics cannot.

    Raises:
        InputError: when `metric`, or every metric, cannot be used.
    """
    chosen: dict[str, list[Selection]] = {}
    unusable: dict[str, str] = {}
    for name in METRICS:
        try:
            chosen[name] = choose(experiment, name, keep, reward_weight)
        except InputError as e:
            if name == metric:
                raise
            unusable[name] = str(e)
    if not chosen:
        raise InputError(next(iter(unusable.values())))
    return chosen, unusable


def render(
    experiment: Experiment,
    chosen: dict[str, list[Selection]],
    unusable: dict[str, str],
    metric: str,
    reward_weight: float,
    thumbnail: int,
    judged: tuple[str, dict[str, Result]] | None = None,
) -> str:
    """The page.

    `judged`, where the experiment was evaluated: the name of GenEval's judge, and its verdicts by the images' names.
    """
    first = chosen[metric]
    judge, verdicts = judged or (None, {})
    short = {name: entry.short for name, entry in TABLE.items()}
    views = []
    for number, selection in enumerate(first):
        by_metric = {name: selections[number] for name, selections in chosen.items()}
        views.append(_prompt_view(selection.prompt, by_metric, metric, thumbnail, verdicts))
    shares = {
        name: {"kept": _percent(yes_share(s, lambda x: x.kept)), "ref": _percent(yes_share(s, lambda x: x.ref))}
        for name, s in chosen.items()
    }
    if judge is not None:
        for name, s in chosen.items():
            shares[name]["right"] = _percent(right_share(s, lambda x: x.kept, verdicts))
    searches = [s.prompt.searched for s in first if s.prompt.searched is not None]
    keeps = sorted({len(s.kept) for s in first})
    return fill_template(
        "report.html",
        title=experiment.folder.name,
        how=drawn_by(experiment.settings),
        has_rewards=any(view.reward != MISSING for prompt in views for view in prompt.images),
        metric=metric,
        metrics={name: TABLE[name].title for name in chosen},
        short=short,
        lower=sorted(name for name, metric in TABLE.items() if metric.lower_is_better),
        # The page may be passed on, so no path of this machine is on it.
        unusable={name: why.replace(f"{experiment.folder}{os.sep}", "") for name, why in unusable.items()},
        formulas={name: formula_of(s, name, reward_weight) for name, s in chosen.items() if TABLE[name].mix},
        without_reward=[name for name, s in chosen.items() if all(x.ranking.without_reward for x in s)],
        prompts=views,
        incomplete=experiment.incomplete,
        not_begun=experiment.not_begun,
        images=sum(len(s.prompt.images) for s in first),
        keeps=str(keeps[0]) if len(keeps) == 1 else f"{keeps[0]} to {keeps[-1]}",
        shares=shares,
        judge=judge,
        right_all=_percent(right_share(first, lambda s: s.ranking.order, verdicts)),
        yes_all=_percent(yes_share(first, lambda s: s.ranking.order)),
        scatter=scatter(first),
        # Among the images of an adaptive search there are no equal chances to be drawn.
        curves={} if searches else {name: best_of_n_plots(selections) for name, selections in chosen.items()},
        search=_search_view(searches),
        data={"prompts": _script_data(chosen, metric, judged), "shares": shares, "short": short},
    )


def _script_data(
    chosen: dict[str, list[Selection]], metric: str, judged: tuple[str, dict[str, Result]] | None
) -> list[dict[str, Any]]:
    """What the page's JavaScript knows of each prompt: orders and scores by metric, and answers."""
    return [
        {
            "keep": len(s.kept),
            "answers": s.answers(),
            **({} if judged is None else {"wrong": _wrong(s.prompt, judged[1])}),
            "filled": s.prompt.searched is not None and s.prompt.searched.filled_up > 0,
            "order": {name: chosen[name][i].ranking.order for name in chosen},
            "scores": {name: [_number(v) for v in chosen[name][i].ranking.scores] for name in chosen},
        }
        for i, s in enumerate(chosen[metric])
    ]


def drawn_by(settings: Mapping[str, Any]) -> str:
    """The model and the sampler's options that settings name, in a line; empty if they name none."""
    values = [
        ("model", str(settings.get("model_path", "")).rstrip("/\\").rpartition("/")[2]),
        ("seed", settings.get("seed")),
        ("guidance", settings.get("guidance_level")),
        ("solver", settings.get("solver")),
        ("steps", settings.get("steps")),
    ]
    return ", ".join(f"{name} {value}" for name, value in values if value not in (None, ""))


def right_share(
    selections: list[Selection], images: Callable[[Selection], Sequence[int]], verdicts: Mapping[str, Result]
) -> tuple[int, int]:
    """How many of the images are right by GenEval's verdicts, and how many have a verdict."""
    found = [_verdict(s.prompt, i, verdicts) for s in selections for i in images(s)]
    return sum(result.correct for result in found if result is not None), sum(result is not None for result in found)


def _verdict(prompt: Prompt, image: int, verdicts: Mapping[str, Result]) -> Result | None:
    return verdicts.get(f"{prompt.name}/samples/{prompt.images[image].name}")


def _wrong(prompt: Prompt, verdicts: Mapping[str, Result]) -> list[int]:
    """The images with the verdict that they are wrong."""
    found = [(i, _verdict(prompt, i, verdicts)) for i in range(len(prompt.images))]
    return [i for i, result in found if result is not None and not result.correct]


def _search_view(searches: list[Searched]) -> dict[str, Any] | None:
    """What the page says of all adaptive searches together; None when there are none."""
    if not searches:
        return None
    total = sum(s.evaluations for s in searches)
    return {
        "mean": f"{total / len(searches):.0f}",
        "total": f"{total:,.0f}",
        "begun": sum(len(s.candidates) for s in searches),
        "fates": ", ".join(f"{sum(s.count(fate) for s in searches)} {fate}" for fate in FATES),
        "filled_up": sum(s.filled_up > 0 for s in searches),
        "plot": histogram([s.evaluations for s in searches], "evaluations", "prompts"),
    }


def _percent(count: tuple[int, int]) -> str:
    return f"{100 * count[0] / count[1]:.0f} %" if count[1] else MISSING


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}".replace("-", "−")


@dataclass(frozen=True)
class ImageView:
    """One image as the page shows it."""

    number: int
    source: str  # data URL
    width: int
    height: int
    answer: str | None
    reward: str
    confidence: str
    seed: Any
    reply: str | None
    scores: dict[str, str]
    verdict: Result | None  # GenEval's


@dataclass(frozen=True)
class CandidateView:
    """One candidate of an adaptive search as the page shows it; `source` is a data URL."""

    number: int
    fate: str
    text: str  # what became of it
    source: str | None
    width: int = SMALL
    height: int = SMALL


@dataclass(frozen=True)
class PromptView:
    """One prompt as the page shows it; `images` are best first by the metric shown first."""

    name: str
    text: str
    keep: int
    yes_kept: int
    images: list[ImageView]
    in_turn: list[ImageView]
    searched: Searched | None
    candidates: list[CandidateView]


def _prompt_view(
    prompt: Prompt, by_metric: dict[str, Selection], metric: str, thumbnail: int, verdicts: Mapping[str, Result]
) -> PromptView:
    """A prompt as the page shows it.

    `by_metric` are its selections, of which that of `metric` is shown first.
    """
    views = []
    rewards = prompt.rewards_or_none()
    for i, path in enumerate(prompt.images):
        source, width, height = thumbnail_of(path, thumbnail)
        answer, reply = prompt.answer(i), prompt.verdicts.response(i).get("reply")
        sure = prompt.verdicts.score(i, f"{answer}_conf_score") if answer in ("yes", "no") else None
        scores = {name: _number(selection.ranking.scores[i]) for name, selection in by_metric.items()}
        views.append(
            ImageView(
                *(i, source, width, height, answer, _number(rewards[i]), _number(sure), prompt.seed(i)),
                reply if isinstance(reply, str) else None,
                scores,
                _verdict(prompt, i, verdicts),
            )
        )
    shown = by_metric[metric]
    yes_kept = sum(prompt.answer(i) == "yes" for i in shown.kept)
    return PromptView(
        *(prompt.name, prompt.text, len(shown.kept), yes_kept, [views[i] for i in shown.ranking.order], views),
        prompt.searched,
        [_candidate_view(c) for c in prompt.searched.candidates] if prompt.searched is not None else [],
    )


def _candidate_view(candidate: Tried) -> CandidateView:
    """A candidate as the page shows it, with what became of it in words."""
    at = "" if candidate.dropped_at is None else f" at t = {candidate.dropped_at:.2f}"
    if candidate.dropped_for is not None:
        reason = f": {candidate.reason}" if candidate.reason else ""
        dropped = f"dropped{at}: {candidate.dropped_for.replace(at, '')}"
        text = f"{dropped}. Revived, since too few images were drawn to the end: {candidate.fate}{reason}"
    else:
        reason = (candidate.reason or "").replace(at, "")  # a reason names the time again
        text = f"{candidate.fate}{at}" + (f": {reason}" if reason else "")
    picture = thumbnail_of(candidate.picture, SMALL) if candidate.picture is not None else (None,)
    return CandidateView(candidate.number, candidate.fate, text, *picture)


def thumbnail_of(path: Path, size: int, formats: tuple[str, ...] = ("PNG",)) -> tuple[str, int, int]:
    """(data URL, width, height) of an image in a file that has one of `formats`.

    The URL holds a PNG if the image is small anyway, else a JPEG.
    """
    from PIL import Image

    from scale_rae.images import to_rgb

    with Image.open(path, formats=formats) as opened:
        flat = to_rgb(opened)
    kind = "PNG" if max(flat.size) <= min(size, 96) else "JPEG"
    flat.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    flat.save(buffer, kind, optimize=True, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}", *flat.size
