"""A contact sheet of an experiment: one PNG with each prompt's images, best first, and their scores."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_rae.errors import InputError
from scale_rae.scaling.select import Experiment, Selection, choose, read_experiment, write_file

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

GROUND, INK, SOFT, EDGE, KEPT = "#ffffff", "#1c1e21", "#5d636b", "#dcdcd6", "#1f5fbf"
ANSWER = {"yes": "#17703f", "no": "#b3400b", "uncertain": "#666c75"}
LARGEST = 200_000_000  # pixels; three bytes each while it is drawn
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
    """Writes the sheet, by default `<folder>_sheet.png`; returns its path and how many prompts are on it.

    Raises:
        InputError: when the folder is no experiment, lacks what the metric needs, or makes too large a picture.
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
    """The picture: prompts in columns, read downwards; kept images first and framed, scores below each."""
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
        left = x + place * (size + _GAP) + (0 if kept else 2 * _GAP)  # the others stand a little apart
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
    """DejaVu Sans where it is installed, which has more scripts than Pillow's own."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _fitted(text: str, width: int, size: int) -> str:
    """The text, cut with … where it is too wide."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "…") > width:
        text = text[: -max(1, len(text) // 20)]
    return text + "…"


def _wrapped(text: str, width: int) -> list[str]:
    """At most two lines, the second cut where the text is longer."""
    first, rest = "", text.split()
    while rest and _font(14).getlength(f"{first} {rest[0]}") <= width:
        first = f"{first} {rest.pop(0)}".strip()
    if not first:
        return [_fitted(text, width, 14)]
    return [_fitted(first, width, 14)] + ([_fitted(" ".join(rest), width, 14)] if rest else [])
