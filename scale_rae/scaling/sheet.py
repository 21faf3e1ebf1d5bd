"""A contact sheet: one PNG with each prompt's images, best first, and their scores."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_rae.errors import InputError
from scale_rae.scaling.reader import Experiment, read_experiment
from scale_rae.scaling.replacing import write_file
from scale_rae.scaling.select import Selection, choose

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

GROUND, INK, SOFT, EDGE, KEPT = "#ffffff", "#1c1e21", "#5d636b", "#dcdcd6", "#1f5fbf"
ANSWER = {"yes": "#17703f", "no": "#b3400b", "uncertain": "#666c75"}
LARGEST = 200_000_000  # pixels; the sheet takes three bytes per pixel while it is drawn
_GAP, _LINE, _MARGIN = 10, 17, 20


def write_sheet(
    folder: Path,
    output: Path | None,
    metric: str,
    keep: int | None,
    reward_weight: float,
    thumbnail: int,
    columns: int | None,
    limit: int | None,
) -> tuple[Path, Experiment, int]:
    """The path of the sheet, once it is written, the experiment, and how many prompts are on the sheet.

    By default the path is `<folder>_sheet.png`. `thumbnail` is the longest side of an image, in pixels.

    Raises:
        InputError: when the folder is no experiment or lacks what the metric needs, or the sheet would be too large.
        OutputError: when the sheet cannot be written.
    """
    experiment = read_experiment(folder)
    selections = choose(experiment, metric, keep, reward_weight)[:limit]
    target = output or experiment.folder.with_name(experiment.folder.name + "_sheet.png")
    heading = f"{experiment.folder.name}, by {metric}"
    buffer = io.BytesIO()
    draw_sheet(selections, heading, thumbnail, columns).save(buffer, "PNG")
    write_file(target, buffer.getvalue(), experiment.folder)
    return target, experiment, len(selections)


def draw_sheet(selections: Sequence[Selection], heading: str, thumbnail: int, columns: int | None) -> Image.Image:
    """The sheet: prompts in columns, read downwards; kept images first, in a frame, with scores below each image."""
    from PIL import Image, ImageDraw

    most = max(len(s.prompt.images) for s in selections)
    cell_width = most * (thumbnail + _GAP) + 2 * _GAP
    texts = [_wrapped(f"{s.prompt.name}  {s.prompt.text}", cell_width - _GAP) for s in selections]
    # The answer and the score have a line each.
    heights = [len(lines) * _LINE + 6 + thumbnail + 8 + 2 * _LINE + 14 for lines in texts]
    if columns is None:  # about as high as wide
        columns = max(1, min(len(selections), round(math.sqrt(sum(heights) / cell_width))))
    per_column = math.ceil(len(selections) / columns)
    stacks = [range(i, min(i + per_column, len(selections))) for i in range(0, len(selections), per_column)]
    width = len(stacks) * cell_width + (len(stacks) + 1) * _MARGIN
    top = _MARGIN + 30
    height = top + max(sum(heights[i] for i in stack) for stack in stacks) + _MARGIN
    if width * height > LARGEST:
        raise InputError(
            f"the sheet would have {width} x {height} pixels; choose a smaller --thumbnail than {thumbnail}, or --limit N"
        )
    sheet = Image.new("RGB", (width, height), GROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN - 4), _fitted(heading, width - 2 * _MARGIN, 18), fill=INK, font=_font(18))
    for column, stack in enumerate(stacks):
        x, y = _MARGIN + column * (cell_width + _MARGIN), top
        for i in stack:
            _draw_prompt(sheet, pen, selections[i], texts[i], x, y, thumbnail)
            y += heights[i]
    return sheet


def _draw_prompt(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, selection: Selection, lines: list[str], x: int, y: int, size: int
) -> None:
    for line in lines:
        pen.text((x, y), line, fill=INK, font=_font(14))
        y += _LINE
    y += 6
    answers, scores = selection.answers(), selection.ranking.scores
    for place, i in enumerate(selection.ranking.order):
        kept = place < len(selection.kept)
        left = x + place * (size + _GAP) + (0 if kept else 2 * _GAP)  # images that are not kept stand apart
        tile = _tile(selection.prompt.images[i], size)
        sheet.paste(tile, (left + (size - tile.width) // 2, y + (size - tile.height) // 2))
        pen.rectangle(
            (left - 3, y - 3, left + size + 2, y + size + 2), outline=KEPT if kept else EDGE, width=3 if kept else 1
        )
        score, answer = scores[i], answers[i]
        value = "–" if score is None else f"{score:.2f}"
        pen.text(
            (left, y + size + 6),
            _fitted(f"#{i}  {answer or '–'}", size, 13),
            fill=ANSWER.get(answer or "", SOFT),
            font=_font(13),
        )
        pen.text((left, y + size + 6 + _LINE), _fitted(value, size, 13), fill=SOFT, font=_font(13))


def _tile(path: Path, size: int) -> Image.Image:
    from PIL import Image

    from scale_rae.images import to_rgb

    with Image.open(path, formats=("PNG",)) as opened:
        flat = to_rgb(opened)
    scale = size / max(flat.size)
    shape = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
    return flat.resize(shape, Image.Resampling.LANCZOS)


@lru_cache
def _font(size: int) -> Any:
    """DejaVu Sans if it is installed, since it has more scripts than Pillow's own font."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _fitted(text: str, width: int, size: int) -> str:
    """The text, cut and ended with … if it is too wide."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "…") > width:
        text = text[: -max(1, len(text) // 20)]
    return text + "…"


def _wrapped(text: str, width: int) -> list[str]:
    """The text in at most two lines; the second is cut if the text is longer."""
    first, rest = "", text.split()
    while rest and _font(14).getlength(f"{first} {rest[0]}") <= width:
        first = f"{first} {rest.pop(0)}".strip()
    if not first:
        return [_fitted(text, width, 14)]
    return [_fitted(first, width, 14)] + ([_fitted(" ".join(rest), width, 14)] if rest else [])
