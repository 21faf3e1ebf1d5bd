"""A contact sheet: one PNG with each prompt's images, best first, and their scores."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scale_rae.errors import InputError
from scale_rae.scaling.reader import Experiment, read_experiment
from scale_rae.scaling.replacing import write_file
from scale_rae.scaling.select import Selection, choose

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

GROUND, INK, SOFT, EDGE, KEPT = "#ffffff", "#1c1e21", "#5d636b", "#dcdcd6", "#1f5fbf"
ANSWER = {"yes": "#17703f", "no": "#b3400b", "uncertain": "#666c75"}
LARGEST = 200_000_000  # pixels; the sheet takes three bytes per pixel while it is drawn
# Files of fonts on Linux, macOS and Windows, in the order in which they are tried. DejaVu Sans has the scripts of Europe, most others have
# Chinese, Japanese or Korean. Pillow's own font has hardly more than ASCII.
FONTS = (
    "DejaVuSans.ttf",
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),
    *("Hiragino Sans GB.ttc", "PingFang.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf"),
    *("segoeui.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf"),
)
_GAP, _LINE, _MARGIN = 10, 17, 20


class Sheet(NamedTuple):
    """A written contact sheet, and how many prompts are on it.

    `missing` are those characters of the prompts that are not in the font of their prompt.
    """

    path: Path
    experiment: Experiment
    prompts: int
    missing: str


def write_sheet(
    folder: Path,
    output: Path | None,
    metric: str,
    keep: int | None,
    reward_weight: float,
    thumbnail: int,
    columns: int | None,
    limit: int | None,
) -> Sheet:
    """The sheet, once it is written.

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
    missing = set().union(*(_lacking(_font(s.prompt.text, 14), s.prompt.text) for s in selections))
    return Sheet(target, experiment, len(selections), "".join(sorted(missing)))


def draw_sheet(selections: Sequence[Selection], heading: str, thumbnail: int, columns: int | None) -> Image.Image:
    """The sheet: prompts in columns, read downwards.

    Kept images are first, in a frame; scores are below each image.
    """
    from PIL import Image, ImageDraw

    most = max(len(s.prompt.images) for s in selections)
    cell_width = most * (thumbnail + _GAP) + 2 * _GAP
    texts = [_wrapped(f"{s.prompt.name}  {s.prompt.text}", cell_width - _GAP, 14) for s in selections]
    # The answer and the score have a line each.
    heights = [len(lines) * _LINE + 6 + thumbnail + 8 + 2 * _LINE + 14 for lines, _ in texts]
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
    _write(pen, (_MARGIN, _MARGIN - 4), heading, width - 2 * _MARGIN, INK, 18)
    for column, stack in enumerate(stacks):
        x, y = _MARGIN + column * (cell_width + _MARGIN), top
        for i in stack:
            _draw_prompt(sheet, pen, selections[i], *texts[i], x, y, thumbnail)
            y += heights[i]
    return sheet


def _draw_prompt(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    selection: Selection,
    lines: list[str],
    font: Any,
    x: int,
    y: int,
    size: int,
) -> None:
    """Draws a prompt at (x, y): the lines of its text, then its images, best first, with answer and score."""
    for line in lines:
        pen.text((x, y), line, fill=INK, font=font)
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
        _write(pen, (left, y + size + 6), f"#{i}  {answer or '–'}", size, ANSWER.get(answer or "", SOFT), 13)
        _write(pen, (left, y + size + 6 + _LINE), value, size, SOFT, 13)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, colour: str, size: int) -> None:
    font = _font(text, size)
    pen.text(place, _fitted(text, width, font), fill=colour, font=font)


def _tile(path: Path, size: int) -> Image.Image:
    """The image at a path, its longest side `size` pixels."""
    from PIL import Image

    from scale_rae.images import to_rgb

    with Image.open(path, formats=("PNG",)) as opened:
        flat = to_rgb(opened)
    scale = size / max(flat.size)
    shape = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
    return flat.resize(shape, Image.Resampling.LANCZOS)


def _font(text: str, size: int) -> Any:
    """The first font of FONTS that is installed and lacks the fewest characters of the text.

    Where the first of FONTS is not installed, Pillow's own font stands for it.
    """
    best = _installed(FONTS[0], size) or _default(size)
    fewest = len(_lacking(best, text))
    for name in FONTS[1:]:
        if not fewest:
            break
        font = _installed(name, size)
        if font is not None and (count := len(_lacking(font, text))) < fewest:
            best, fewest = font, count
    return best


@lru_cache
def _installed(name: str, size: int) -> Any:
    """The font in a file of that name, None if there is none.

    Pillow looks for the file where the system keeps its fonts.
    """
    from PIL import ImageFont

    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache
def _default(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _lacking(font: Any, text: str) -> set[str]:
    """The characters of a text that the font has no drawing of."""
    return {c for c in _shown(text) if c != " " and _drawing(font, c) == _drawing(font, "\uffff")}


@lru_cache(None)
def _drawing(font: Any, character: str) -> bytes:
    """What a font draws; for U+FFFF, which is no character, what it draws for those that it lacks."""
    return bytes(font.getmask(character))


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _fitted(text: str, width: int, font: Any) -> str:
    """The text, cut and ended with … if it is too wide."""
    text = _shown(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[: -max(1, len(text) // 20)]
    return text + "…"


def _wrapped(text: str, width: int, size: int) -> tuple[list[str], Any]:
    """The text in at most two lines, and its font; the second line is cut if the text is longer."""
    first, rest, font = "", text.split(), _font(text, size)
    while rest and font.getlength(f"{first} {rest[0]}") <= width:
        first = f"{first} {rest.pop(0)}".strip()
    if not first:
        return [_fitted(text, width, font)], font
    return [_fitted(line, width, font) for line in (first, " ".join(rest)) if line], font
