"""Judges of pictures: GenEval's detector and colour classifier, and the bundled model's judge. Imports no torch before one is opened.

To add a judge, add a name to results.JUDGES, a check of metadata to `metadata_check`, and its identity to `identity_of`, and a
class with `judge` to `open_judge`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from scale_rae.errors import InputError, OptionError, need
from scale_rae.geneval.journal import Judged, Mark
from scale_rae.geneval.results import JUDGES
from scale_rae.geneval.verdicts import CLASSES, COLORS, check_metadata
from scale_rae.options import Knob, check_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

_JUDGE = "Judge"
_MASK_SIDE = 160  # pixels, of the masks that are kept for the page
_SHAPES_VERSION = 1  # of the judge of shapes; another number has pictures judged anew


class Judge(Protocol):
    """Says of pictures whether they show their prompts."""

    def judge(self, images: Sequence[Image.Image], metadata: Sequence[Mapping[str, Any]]) -> list[Judged]:
        """The verdict on each RGB picture, of any size, with its prompt's metadata."""


@dataclass(frozen=True)
class JudgeChoice:
    """Which judge, and with which models."""

    judge: Annotated[
        str,
        Knob(
            "geneval: GenEval's detector and colour classifier. shapes: the judge of the bundled model's pictures, which needs no "
            "other model.",
            _JUDGE,
            choices=JUDGES,
        ),
    ] = "geneval"

    def check(self) -> None:
        """Raises OptionError, naming the flag, for values that no evaluation can use."""
        check_options(self, flags=True)


def metadata_check(choice: JudgeChoice) -> Callable[[Mapping[str, Any]], None]:
    """A function that raises InputError, naming the field, for metadata that the judge cannot compare a picture with."""
    if choice.judge == "shapes":
        need("shapes", "--judge shapes", "skimage", "scipy")
        from scale_rae.shapes import world

        def check(metadata: Mapping[str, Any]) -> None:
            check_metadata(metadata, world.SHAPES, world.COLORS)
            if "include" not in metadata:
                raise InputError("metadata: include is missing")

        return check
    return lambda metadata: check_metadata(metadata, CLASSES, COLORS)


def identity_of(choice: JudgeChoice) -> dict[str, Any]:
    """What the chosen judge's verdicts depend on besides picture and metadata: models by their hashes, options. Loads nothing.

    Raises:
        ScaleRAEError: when a model is missing.
    """
    if choice.judge == "geneval":
        raise OptionError("--judge geneval: the detector is not part of this version; use --judge shapes")
    return {"judge": "shapes", "version": _SHAPES_VERSION}


def open_judge(choice: JudgeChoice, device: str | None) -> Judge:
    """The judge, with its models loaded onto a device.

    Raises:
        ScaleRAEError: when a model is missing or cannot be used, or the device is not there.
    """
    return ShapesJudge()


class ShapesJudge:
    """The judge of the bundled model's world (`shapes.judge`): reads objects from pixels, and counts anything else as wrong."""

    def judge(self, images: Sequence[Image.Image], metadata: Sequence[Mapping[str, Any]]) -> list[Judged]:
        """See `Judge`. Pictures that are not square or too small get a problem."""
        return [self._judge(image, record) for image, record in zip(images, metadata, strict=True)]

    def _judge(self, image: Image.Image, metadata: Mapping[str, Any]) -> Judged:
        from scale_rae.shapes.judge import compare, find_regions

        try:
            regions = find_regions(image)
        except ValueError as e:
            return Judged(problem=str(e))
        verdict = compare(tuple(thing for thing, _ in regions), dict(metadata))
        marks = [
            Mark(thing.shape, _box(mask, image.width), round(thing.confidence, 6), thing.color, png_of(mask))
            for thing, mask in regions
        ]
        details: dict[str, list[list[float]]] = {}
        for mark in marks:
            details.setdefault(mark.name, []).append([*mark.box, mark.score])
        return Judged(verdict.correct, "\n".join(verdict.reason.split("; ")), details, marks, list(image.size))


def png_of(mask: NDArray[np.bool_]) -> str:
    """A mask [H, W] as a PNG in base64: black and white, at most _MASK_SIDE pixels a side."""
    from PIL import Image

    image = Image.fromarray(mask)
    image.thumbnail((_MASK_SIDE, _MASK_SIDE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _box(mask: NDArray[np.bool_], width: int) -> list[float]:
    """The box of a mask [S, S] in pixels of a square picture of that width: x0, y0, x1, y1, the last two just outside."""
    import numpy as np

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    scale = width / len(mask)
    return [float(scale * x) for x in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
