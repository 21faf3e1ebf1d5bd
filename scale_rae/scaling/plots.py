"""The report's plots as inline SVG, coloured by the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scale_rae.scaling.select import Selection

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 290, 56, 14, 14, 48


def expected_best(values: Sequence[float], order: Sequence[int], n: int) -> float:
    """The mean of `values` at the best of n images, over all ways to take n images.

    `order` lists the images best first.
    """
    total = math.comb(len(order), n)
    return math.fsum(math.comb(len(order) - r - 1, n - 1) * values[i] for r, i in enumerate(order)) / total


def best_of_n(selections: Sequence[Selection]) -> tuple[list[float] | None, list[float] | None]:
    """Share of yes, and mean reward, at the best of n = 1, 2, … images.

    They are None where there are no answers or rewards. The mean is over all ways to take n of a prompt's images, and over
    prompts.
    """
    most = min(len(s.prompt.images) for s in selections)
    yes = [[float(a == "yes") for a in s.answers()] for s in selections]
    asked = any(a is not None for s in selections for a in s.answers())
    rewards = [[v for v in s.prompt.rewards_or_none() if v is not None] for s in selections]
    full = all(len(values) == len(s.prompt.images) for values, s in zip(rewards, selections, strict=True))

    def curve(of: Sequence[Sequence[float]]) -> list[float]:
        both = list(zip(of, selections, strict=True))
        return [
            math.fsum(expected_best(values, s.ranking.order, n) for values, s in both) / len(both)
            for n in range(1, most + 1)
        ]

    return curve(yes) if asked else None, curve(rewards) if full else None


def best_of_n_plots(selections: Sequence[Selection]) -> list[dict[str, str]]:
    """The plots of `best_of_n`, each with a title and an SVG."""
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
    """An SVG of a line through values at x = 1, 2, …."""
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
    for i in sorted({0, most - 1}):  # at the line's ends, on the side where it does not run
        (x, y), first = points[i], i == 0
        neighbour = points[1 if first else -2][1] if most > 1 else y
        y += -10 if (neighbour > y + 1 and first) or y + 24 > bottom else 20
        anchor = f'x="{x + 6 * first:.1f}" y="{y:.1f}" text-anchor="{"start" if first else "end"}"'
        labels += f'<text class="value" {anchor}>{_short(values[i])}</text>'
    return axes.svg(f'<polyline class="line" points="{path}"/>{marks}{labels}', ticks, x_title, y_title)


def histogram(values: Sequence[float], x_title: str, y_title: str) -> str:
    """An SVG of how many of the values lie in each of about ten ranges."""
    low, high = min(values), max(values)
    ticks = round_ticks(low, high if high > low else low + 5)
    width = (ticks[1] - ticks[0]) / 2 if len(ticks) > 1 else (high - low or 1)
    places = [math.floor(value / width + 1e-9) for value in values]
    first, last = min(places), max(places)
    most = max(places.count(place) for place in places)
    axes = _Axes(first * width, (last + 1) * width, 0, max(5, 1.1 * most))  # from 5 on, ticks are whole numbers
    columns = ""
    for place in range(first, last + 1):
        count = places.count(place)
        left, right, top = axes.x(place * width) + 1, axes.x((place + 1) * width) - 1, axes.y(count)
        columns += f'<path class="column" d="M{left:.1f},{axes.y(0):.1f}V{top:.1f}H{right:.1f}V{axes.y(0):.1f}z">'
        columns += f"<title>{_tick(place * width)} to {_tick((place + 1) * width)}: {count}</title></path>"
    return axes.svg(columns, None, x_title, y_title)


def scatter(selections: Sequence[Selection]) -> str | None:
    """An SVG of reward against confidence in the answer, a point per image; None where no image has both.

    The confidence of a no is negative.
    """
    points = []
    for p, selection in enumerate(selections):
        prompt = selection.prompt
        for i, reward in enumerate(prompt.rewards_or_none()):
            sure = prompt.verdicts.answer_score(i, "conf_score")
            if reward is not None and sure is not None:
                points.append((p, i, prompt.answer(i), sure, reward, i in selection.kept))
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
    """The plot's frame, and where a value lies in it."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)

    def svg(self, content: str, x_ticks: Iterable[float] | None, x_title: str, y_title: str) -> str:
        """The plot; the titles are constants of this module and need no escaping."""
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
    """About five round numbers from low to high."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")
