"""One HTML page of an evaluation: its summary, and every wrong picture with the reason.

The page contains everything it shows; its few lines of JavaScript only filter.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scale_rae.errors import first_line
from scale_rae.geneval.evaluation import FORMATS, Evaluation
from scale_rae.geneval.journal import Mark
from scale_rae.geneval.judges import NOT_COMPARABLE
from scale_rae.geneval.policies import Policy
from scale_rae.geneval.results import REASON_KINDS, THUMBNAIL, Result
from scale_rae.geneval.summary import Summary
from scale_rae.scaling.report import thumbnail_of
from scale_rae.shares import Share
from scale_rae.templates import fill_template

MOST_PICTURES = 2000  # on a page; at 224 pixels each has about 10 KB
_COLORS = ("#e4572e", "#2e86de", "#17a673", "#c837ab", "#e0a100", "#6c5ce7", "#00a3a3", "#9c6b30")
_OPACITY = 70  # of masks, 0 to 255


@dataclass(frozen=True)
class MarkView:
    """An object as the page shows it: its text, its box in the picture's pixels, and its outline's colour."""

    text: str
    x: float
    y: float
    width: float
    height: float
    color: str


@dataclass(frozen=True)
class PictureView:
    """A wrong picture on the page; `source` and `masks` are data URLs, `size` is its width and height."""

    name: str
    prompt: str
    tag: str
    reasons: list[str]
    kinds: list[str]
    source: str
    width: int
    height: int
    size: list[int]
    marks: list[MarkView]
    masks: str | None


def render(
    evaluation: Evaluation,
    summary: Summary,
    policies: Sequence[Policy],
    thumbnail: int = THUMBNAIL,
    most: int = MOST_PICTURES,
) -> str:
    """The page. If more than `most` pictures are wrong, it shows `most` of them, spread evenly.

    `thumbnail` is the longest side of a picture on the page, in pixels.
    """
    wrong = [result for result in evaluation.results if not result.correct]
    shown = wrong if len(wrong) <= most else [wrong[i * len(wrong) // most] for i in range(most)]
    kinds = Counter(kind for result in wrong for kind in result.reasons)
    views = [view for result in shown if (view := _view(evaluation, result, thumbnail)) is not None]
    return fill_template(
        "geneval.html",
        title=evaluation.folder.folder.name,
        judge=judge_words(evaluation.judge),
        note=note_on(evaluation.judge),
        summary=summary,
        overall=f"{100 * summary.overall:.1f}",
        overall_interval=percents(summary.overall_interval),
        rows=[(tag, percent(share), percents(share.interval), share) for tag, share in summary.tags.items()],
        images=percent(summary.images),
        prompts=percent(summary.prompts),
        policies=[policy_row(policy) for policy in policies],
        pictures=views,
        wrong=len(wrong),
        tags=[tag for tag in summary.tags if any(view.tag == tag for view in views)],
        kinds=[(kind, kinds[kind]) for kind in REASON_KINDS if kinds[kind]],
        missing=evaluation.missing,
    )


def judge_words(judge: Mapping[str, Any]) -> str:
    """A judge in words: its name, and what its verdicts rest on; hashes are cut after 12 digits."""
    words = [f"Judged by {judge['judge']}"]
    for name, value in judge.items():
        if name not in ("judge", "comparable") and value is not None:
            text = str(value)[:12] if name.endswith(("_sha256", "_revision")) else str(value)
            words.append(f"{name.replace('_', ' ')} {text}")
    return " · ".join(words)


def note_on(judge: Mapping[str, Any]) -> str:
    """Why scores cannot be compared with published ones; empty if they can."""
    if judge.get("judge") != "geneval":
        return f"Judged by {judge.get('judge')}, not by GenEval's detector: not comparable with published scores."
    return "" if judge.get("comparable") else f"{NOT_COMPARABLE[0].upper()}{NOT_COMPARABLE[1:]}."


def policy_row(policy: Policy) -> dict[str, str]:
    """A policy as a row of a table: texts under the names of the columns."""
    found = policy.summary
    return {
        "policy": policy.name,
        "pictures": policy.pictures,
        "overall": f"{100 * found.overall:.1f}",
        "interval": percents(found.overall_interval),
        "images": percent(found.images),
        "prompts": percent(found.prompts),
    }


def percent(share: Share) -> str:
    """A share in per cent: "53.2"."""
    return f"{100 * share.value:.1f}"


def percents(interval: tuple[float, float]) -> str:
    """An interval in per cent: "50.1 to 56.3"."""
    return " to ".join(f"{100 * x:.1f}" for x in interval)


def _view(evaluation: Evaluation, result: Result, thumbnail: int) -> PictureView | None:
    """What the page shows of a wrong picture; None for one that has been removed since it was judged."""
    judged = evaluation.judged[result.filename]
    try:
        source, width, height = thumbnail_of(evaluation.folder.folder / result.filename, thumbnail, FORMATS)
    except OSError:
        return None
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(judged.marks))]
    marks = [_mark(mark, color) for mark, color in zip(judged.marks, colors, strict=True)]
    size = judged.size or [width, height]
    return PictureView(
        result.filename,
        result.prompt,
        result.tag,
        result.reason.split("\n"),
        result.reasons,
        source,
        width,
        height,
        size,
        marks,
        _masks(judged.marks, colors),
    )


def _mark(mark: Mark, color: str) -> MarkView:
    x0, y0, x1, y1 = mark.box
    text = f"{mark.color} {mark.name}" if mark.color else mark.name
    return MarkView(f"{text} {mark.score:.2f}", x0, y0, max(x1 - x0, 0.0), max(y1 - y0, 0.0), color)


def _masks(marks: Sequence[Mark], colors: Sequence[str]) -> str | None:
    """The masks in their boxes' colours, the best object's on top, as a data URL; None without masks."""
    from PIL import Image, ImageColor

    over: Image.Image | None = None
    for mark, color in reversed(list(zip(marks, colors, strict=True))):
        if mark.mask is None:
            continue
        try:
            with Image.open(io.BytesIO(base64.b64decode(mark.mask)), formats=("PNG",)) as opened:
                mask = opened.convert("L")
        except (OSError, ValueError, SyntaxError) as e:
            raise ValueError(f"a mask is damaged ({first_line(e)})") from e
        over = over or Image.new("RGBA", mask.size)
        if mask.size == over.size:
            over.paste((*ImageColor.getrgb(color)[:3], _OPACITY), mask=mask)
    if over is None:
        return None
    buffer = io.BytesIO()
    over.quantize(16, Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
