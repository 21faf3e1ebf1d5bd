"""One HTML page of an experiment: every prompt's images in the order of a metric, and plots of their scores.

The page holds everything it shows. All orders are worked out here; its few lines of JavaScript only switch between them.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from scale_rae.errors import InputError
from scale_rae.ranking import METRICS, TABLE
from scale_rae.scaling.select import (
    Experiment,
    Prompt,
    Selection,
    choose,
    read_experiment,
    write_file,
    yes_share,
)


def write_report(
    folder: Path, output: Path | None, metric: str | None, keep: int | None, reward_weight: float, thumbnail: int
) -> tuple[Path, Experiment]:
    """Writes the page, by default `<folder>_report.html`; `metric` is the one shown first, by default the first usable.

    Raises:
        InputError: when the folder is no experiment, or no metric (or not the asked one) can rank it.
        OutputError: when the page cannot be written.
    """
    experiment = read_experiment(folder)
    chosen, unusable = usable_metrics(experiment, metric, keep, reward_weight)
    target = output or experiment.folder.with_name(experiment.folder.name + "_report.html")
    page = render(experiment, chosen, unusable, metric or next(iter(chosen)), reward_weight, thumbnail)
    write_file(target, page.encode("utf-8", "replace"), experiment.folder)
    return target, experiment


def usable_metrics(
    experiment: Experiment, metric: str | None, keep: int | None, reward_weight: float
) -> tuple[dict[str, list[Selection]], dict[str, str]]:
    """The selections by each metric that every prompt has the fields of, and why the others cannot be used."""
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
) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    first = chosen[metric]
    short = {name: entry.short for name, entry in TABLE.items()}
    views = []
    for number, selection in enumerate(first):
        by_metric = {name: selections[number] for name, selections in chosen.items()}
        views.append(_prompt_view(selection.prompt, by_metric, metric, thumbnail))
    shares = {
        name: {"kept": _percent(yes_share(s, lambda x: x.kept)), "ref": _percent(yes_share(s, lambda x: x.ref))}
        for name, s in chosen.items()
    }
    data = {
        "prompts": [
            {
                "keep": len(s.kept),
                "answers": s.answers(),
                "order": {name: chosen[name][i].ranking.order for name in chosen},
                "scores": {name: [_number(v) for v in chosen[name][i].ranking.scores] for name in chosen},
            }
            for i, s in enumerate(first)
        ],
        "shares": shares,
        "short": short,
    }
    template = files("scale_rae").joinpath("assets", "report.html").read_text(encoding="utf-8")
    env = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    keeps = sorted({len(s.kept) for s in first})
    return env.from_string(template).render(
        title=experiment.folder.name,
        metric=metric,
        metrics={name: TABLE[name].title for name in chosen},
        short=short,
        lower=sorted(name for name, metric in TABLE.items() if metric.lower_is_better),
        # The page may go to others: no path of this machine is on it.
        unusable={name: why.replace(f"{experiment.folder}{os.sep}", "") for name, why in unusable.items()},
        reward_weight=reward_weight,
        without_reward="combined" in chosen and all(s.ranking.without_reward for s in chosen["combined"]),
        prompts=views,
        incomplete=experiment.incomplete,
        not_begun=experiment.not_begun,
        images=sum(len(s.prompt.images) for s in first),
        keeps=str(keeps[0]) if len(keeps) == 1 else f"{keeps[0]} to {keeps[-1]}",
        shares=shares,
        yes_all=_percent(yes_share(first, lambda s: s.ranking.order)),
        scatter=scatter(first),
        curves={name: best_of_n_plots(selections) for name, selections in chosen.items()},
        data=data,
    )


def _percent(count: tuple[int, int]) -> str:
    return f"{100 * count[0] / count[1]:.0f} %" if count[1] else "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


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


@dataclass(frozen=True)
class PromptView:
    """One prompt as the page shows it; `images` are best first by the metric shown first."""

    name: str
    text: str
    keep: int
    yes_kept: int
    images: list[ImageView]
    in_turn: list[ImageView]


def _prompt_view(prompt: Prompt, by_metric: dict[str, Selection], metric: str, thumbnail: int) -> PromptView:
    views = []
    rewards = _rewards(prompt)
    for i, path in enumerate(prompt.images):
        source, width, height = _thumbnail(path, thumbnail)
        answer, reply = prompt.answer(i), prompt.verdicts.response(i).get("reply")
        sure = prompt.verdicts.score(i, f"{answer}_conf_score") if answer in ("yes", "no") else None
        scores = {name: _number(selection.ranking.scores[i]) for name, selection in by_metric.items()}
        views.append(
            ImageView(
                *(i, source, width, height, answer, _number(rewards[i]), _number(sure), prompt.seed(i)),
                reply if isinstance(reply, str) else None,
                scores,
            )
        )
    shown = by_metric[metric]
    yes_kept = sum(prompt.answer(i) == "yes" for i in shown.kept)
    return PromptView(
        *(prompt.name, prompt.text, len(shown.kept), yes_kept), [views[i] for i in shown.ranking.order], views
    )


def _rewards(prompt: Prompt) -> Sequence[float | None]:
    """Rewards to be shown: where they cannot be used, none."""
    try:
        return prompt.verdicts.rewards() or [None] * len(prompt.images)
    except InputError:
        return [None] * len(prompt.images)


def _thumbnail(path: Path, size: int) -> tuple[str, int, int]:
    """A data URL: PNG of what is small anyway, else JPEG."""
    from PIL import Image

    from scale_rae.images import to_rgb

    with Image.open(path, formats=("PNG",)) as opened:
        flat = to_rgb(opened)
    kind = "PNG" if max(flat.size) <= min(size, 96) else "JPEG"
    flat.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    flat.save(buffer, kind, optimize=True, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}", *flat.size


# Plots: inline SVG, coloured by the page's CSS.

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 290, 56, 14, 14, 48


def expected_best(values: Sequence[float], order: Sequence[int], n: int) -> float:
    """The mean of `values` at the best of n images, over all ways to take n of them; `order` is best first."""
    total = math.comb(len(order), n)
    return math.fsum(math.comb(len(order) - r - 1, n - 1) * values[i] for r, i in enumerate(order)) / total


def best_of_n(selections: Sequence[Selection]) -> tuple[list[float] | None, list[float] | None]:
    """Share of yes, and mean reward, of the best of n = 1, 2, … images; None where there are no answers or rewards.

    Over all ways to take n of a prompt's images, in the order that all of them have, mean over prompts.
    """
    most = min(len(s.prompt.images) for s in selections)
    yes = [[float(a == "yes") for a in s.answers()] for s in selections]
    asked = any(a is not None for s in selections for a in s.answers())
    rewards = [[v for v in _rewards(s.prompt) if v is not None] for s in selections]
    full = all(len(values) == len(s.prompt.images) for values, s in zip(rewards, selections, strict=True))

    def curve(of: Sequence[Sequence[float]]) -> list[float]:
        both = list(zip(of, selections, strict=True))
        return [
            math.fsum(expected_best(values, s.ranking.order, n) for values, s in both) / len(both)
            for n in range(1, most + 1)
        ]

    return curve(yes) if asked else None, curve(rewards) if full else None


def best_of_n_plots(selections: Sequence[Selection]) -> list[dict[str, str]]:
    """The plots of `best_of_n`, each a title and an SVG."""
    yes, reward = best_of_n(selections)
    plots = []
    if yes is not None:
        low, high = 0.0, 100.0
        svg = line_plot([100 * v for v in yes], low, high, "samples drawn, n", "yes about the best of n, %")
        plots.append({"title": "How often the model says yes about the best of n", "svg": svg})
    if reward is not None:
        low, high = _padded(reward, 0.18)
        svg = line_plot(reward, low, high, "samples drawn, n", "reward of the best of n")
        plots.append({"title": "Reward of the best of n", "svg": svg})
    return plots


def line_plot(values: Sequence[float], low: float, high: float, x_title: str, y_title: str) -> str:
    """A line through values at 1, 2, …."""
    most = len(values)
    step = max(1, math.ceil(most / 10))
    ticks = [n for n in range(1, most + 1) if n == 1 or n % step == 0]
    axes = _Axes(0.5 if most == 1 else 1, most + 0.5 if most == 1 else most, low, high)
    points = [(axes.x(n), axes.y(v)) for n, v in enumerate(values, 1)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = "".join(
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>n = {n}: {v:.3g}</title></circle>'
        for (x, y), (n, v) in zip(points, enumerate(values, 1), strict=True)
    )
    bottom = _HEIGHT - _BOTTOM
    labels = ""
    for i in sorted({0, most - 1}):  # at the line's ends, on the side that it leaves free
        (x, y), first = points[i], i == 0
        neighbour = points[1 if first else -2][1] if most > 1 else y
        y += -10 if (neighbour > y + 1 and first) or y + 24 > bottom else 20
        anchor = f'x="{x + 6 * first:.1f}" y="{y:.1f}" text-anchor="{"start" if first else "end"}"'
        labels += f'<text class="value" {anchor}>{_short(values[i])}</text>'
    return axes.svg(f'<polyline class="line" points="{path}"/>{marks}{labels}', ticks, x_title, y_title)


def scatter(selections: Sequence[Selection]) -> str | None:
    """Reward against confidence of every image; None without both. A no lies to the left of zero."""
    points = []
    for p, selection in enumerate(selections):
        prompt, rewards = selection.prompt, _rewards(selection.prompt)
        for i, reward in enumerate(rewards):
            answer = prompt.answer(i)
            sure = (
                0.0 if answer == "uncertain" else prompt.verdicts.score(i, f"{answer}_conf_score") if answer else None
            )
            if reward is not None and sure is not None:
                points.append((p, i, answer, -sure if answer == "no" else sure, reward, i in selection.kept))
    if not points:
        return None
    axes = _Axes(*_padded([x for _, _, _, x, _, _ in points]), *_padded([y for _, _, _, _, y, _ in points]))
    marks = []
    for p, i, answer, sure, reward, kept in points:
        x, y = axes.x(sure), axes.y(reward)
        shape = {
            "yes": f"M{x - 4:.1f},{y:.1f}a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
            "no": f"M{x:.1f},{y - 5:.1f}l5,5l-5,5l-5,-5z",
            "uncertain": f"M{x - 4:.1f},{y - 4:.1f}h8v8h-8z",
        }[answer or "uncertain"]
        name = f"{selections[p].prompt.name}, image {i}"
        marks.append(
            f'<path class="point {answer}{" kept" if kept else ""}" data-p="{p}" data-i="{i}" d="{shape}">'
            f"<title>{name}: {answer}, reward {reward:.3f}</title></path>"
        )
    return axes.svg("".join(marks), None, "← sure of no   ·   confidence   ·   sure of yes →", "reward")


def _padded(values: Sequence[float], by: float = 0.08) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = by * (high - low) or 0.5
    return low - pad, high + pad


def _short(value: float) -> str:
    return (f"{value:.0f}" if abs(value) >= 10 else f"{round(value, 2) + 0.0:.2f}").replace("-", "−")


@dataclass(frozen=True)
class _Axes:
    """From values to places in the SVG, with the frame around them."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)

    def svg(self, content: str, x_ticks: Iterable[float] | None, x_title: str, y_title: str) -> str:
        """The plot; titles are plain words of ours and need no escaping."""
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = []
        for value in round_ticks(self.y_low, self.y_high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
        for value in x_ticks if x_ticks is not None else round_ticks(self.x_low, self.x_high):
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{_tick(value)}</text>')
        middle = (_LEFT + right) / 2
        parts.append(f'<text x="{middle}" y="{_HEIGHT - 9}" text-anchor="middle">{x_title}</text>')
        parts.append(
            f'<text transform="translate(14,{(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{y_title}</text>'
        )
        frame = f'<path class="frame" d="M{_LEFT},{_TOP}V{bottom}H{right}"/>'
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{y_title} against {x_title}">'
            f"{''.join(parts)}{frame}{content}</svg>"
        )


def round_ticks(low: float, high: float) -> list[float]:
    """About five round numbers between low and high."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")
