"""Judges of pictures: GenEval's detector and colour classifier, and the bundled model's judge.

Imports no torch before one is opened. To add a judge, add a name to results.JUDGES, a check of metadata to
`metadata_check`, and its identity to `identity_of`, and a class with `judge` to `open_judge`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from scale_rae.errors import InputError, OptionError, need
from scale_rae.files import sha256
from scale_rae.geneval.journal import Judged, Mark
from scale_rae.geneval.published import CLIP, CONVERTED_FROM, DETECTOR_ADDRESS, DETECTOR_FILE, DETECTOR_SHA256
from scale_rae.geneval.results import JUDGES
from scale_rae.geneval.verdicts import CLASSES, COLORS, PUBLISHED_OPTIONS, VerdictOptions, check_metadata
from scale_rae.hub import find, weight_files
from scale_rae.jsonio import read_json
from scale_rae.options import Knob, check_options, options_of, to_record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from scale_rae.geneval.colors import ColorClassifier
    from scale_rae.geneval.detector import Detector
    from scale_rae.geneval.judging import Judgement
    from scale_rae.hub import Source

NOT_COMPARABLE = "not comparable with published scores: other weights, options or number formats than those of GenEval's own evaluator"
_JUDGE = "Judge"
_MASK_SIDE = 160  # pixels, of the masks that are kept for the page
_SHAPES_VERSION = 1  # of the judge of shapes; another number has pictures judged anew


class Judge(Protocol):
    """Judges whether pictures show what their prompts name."""

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
    detector: Annotated[
        str | None,
        Knob(
            "GenEval's detector: the published .pth file, the folder that `convert-detector` wrote, or a folder or hub id of "
            "transformers' Mask2Former. docs/geneval.md says where the file is.",
            _JUDGE,
            metavar="FILE|DIR|ID",
            show_default=False,
        ),
    ] = None
    clip: Annotated[str, Knob("CLIP, which names colours: folder or hub id.", _JUDGE)] = CLIP
    detector_dtype: Annotated[
        str,
        Knob("What the detector computes in; published scores are float32's.", _JUDGE, choices=("float32", "bfloat16")),
    ] = "float32"
    options: VerdictOptions = PUBLISHED_OPTIONS

    def check(self) -> None:
        """Raises OptionError, naming the flag, for values that no evaluation can use."""
        check_options(self, flags=True)
        if self.judge == "geneval" and self.detector is None:
            raise OptionError(
                f"--detector: is needed: the file {DETECTOR_FILE}, which GenEval's own evaluation downloads from {DETECTOR_ADDRESS} "
                "(or give --judge shapes for pictures of the bundled model)"
            )
        if self.judge != "geneval":
            given = [o for o in options_of(JudgeChoice, self) if o.name != "judge" and o.default != _DEFAULTS[o.name]]
            if given:
                raise OptionError(f"--{given[0].name.replace('_', '-')}: --judge {self.judge} has no such option")


_DEFAULTS = {option.name: option.default for option in options_of(JudgeChoice)}


def metadata_check(choice: JudgeChoice) -> Callable[[Mapping[str, Any]], None]:
    """A function that raises InputError, naming the field, for metadata that the judge cannot use."""
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
    """What the judge's verdicts depend on besides picture and metadata: options, and hashes of models.

    Loads nothing.

    Raises:
        ScaleRAEError: when a model is missing.
    """
    if choice.judge == "shapes":
        return {"judge": "shapes", "version": _SHAPES_VERSION}
    detector = _detector_identity(str(choice.detector))
    as_published = choice.options == PUBLISHED_OPTIONS and choice.detector_dtype == "float32"
    return {
        "judge": "geneval",
        "comparable": as_published and detector.get("detector_sha256") == DETECTOR_SHA256,
        **detector,
        **_weights_identity("clip", find(choice.clip, "colour classifier")),
        "detector_dtype": choice.detector_dtype,
        **to_record(choice.options),
    }


def _detector_identity(name: str) -> dict[str, Any]:
    """The name and hash of a detector's weights; those of a converted folder are the published file's."""
    if (file := Path(name).expanduser()).is_file():
        return {"detector": file.name, "detector_sha256": sha256(file)}
    source = find(name, "detector")
    if isinstance(origin := read_json(source.folder / "config.json").get(CONVERTED_FROM), dict):
        return {"detector": origin.get("name"), "detector_sha256": origin.get("sha256")}
    return _weights_identity("detector", source)


def _weights_identity(what: str, source: Source) -> dict[str, Any]:
    """The name of a model, and its commit on the hub or the hashes of its weight files."""
    if source.revision:
        return {what: source.name, f"{what}_revision": source.revision}
    hashes = [sha256(file) for file in weight_files(source.folder)]
    return {what: source.folder.name, f"{what}_sha256": hashes[0] if len(hashes) == 1 else hashes}


def open_judge(choice: JudgeChoice, device: str | None) -> Judge:
    """The judge, with its models loaded onto a device.

    Raises:
        ScaleRAEError: when a model is missing or cannot be used, or the device is not there.
    """
    if choice.judge == "shapes":
        return ShapesJudge()
    from scale_rae.geneval.colors import ColorClassifier
    from scale_rae.geneval.detector import Detector

    detector = Detector(str(choice.detector), device, choice.detector_dtype)
    return GenEvalJudge(detector, ColorClassifier(choice.clip, device), choice.options)


class GenEvalJudge:
    """GenEval's own judge: a detector, a colour classifier, and the rules (`judging.judge`)."""

    def __init__(self, detector: Detector, classifier: ColorClassifier, options: VerdictOptions) -> None:
        self._detector, self._classifier, self._options = detector, classifier, options

    def judge(self, images: Sequence[Image.Image], metadata: Sequence[Mapping[str, Any]]) -> list[Judged]:
        """See `Judge`. Wrong pictures keep their masks, for the page. Too narrow ones get a problem."""
        from scale_rae.geneval.detector import size_problem
        from scale_rae.geneval.judging import judge

        problems = [size_problem(*image.size, self._detector.scale) for image in images]
        good = [number for number, problem in enumerate(problems) if not problem]
        judged = [Judged(problem=problem) for problem in problems]
        if good:
            models = (self._detector, self._classifier, self._options)
            found = judge([images[number] for number in good], [metadata[number] for number in good], *models)
            for number, one in zip(good, found, strict=True):
                judged[number] = _judged(one, images[number].size)
        return judged


def _judged(found: Judgement, size: tuple[int, int]) -> Judged:
    verdict, marks = found.verdict, []
    for name, numbers in found.kept.items():
        for number in numbers:
            *box, score = (float(x) for x in found.detections.boxes[name][number])
            mask = None if verdict.correct else png_of(found.detections.masks[name][number])
            marks.append(Mark(name, box, score, found.colors.get((name, number)), mask))
    return Judged(verdict.correct, verdict.reason, verdict.details, marks, list(size))


class ShapesJudge:
    """The bundled model's judge (`shapes.judge`): a picture with anything that was not asked for is wrong."""

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
    """The box [x0, y0, x1, y1] of a mask [S, S], in pixels of a square picture; x1, y1 are just outside."""
    import numpy as np

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    scale = width / len(mask)
    return [float(scale * x) for x in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
