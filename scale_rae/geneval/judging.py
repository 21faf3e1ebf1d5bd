"""GenEval from pictures to verdicts: detect objects, classify the colours of crops, apply the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from scale_rae.geneval.colors import ColorClassifier
from scale_rae.geneval.crops import BACKGROUND, crop
from scale_rae.geneval.detector import Detections, Detector
from scale_rae.geneval.verdicts import PUBLISHED_OPTIONS, Verdict, VerdictOptions, color_calls, keep, verdict


@dataclass(frozen=True)
class Judgement:
    """A verdict, with the detections and colours that it depends on.

    `kept` has the numbers of each class's objects in `detections`, in the order of the verdict's details. `colors` has the
    colours that were asked for, by class and number.
    """

    verdict: Verdict
    detections: Detections
    kept: dict[str, list[int]]
    colors: dict[tuple[str, int], str]


def judge(
    images: Sequence[Image.Image],
    metadata: Sequence[Mapping[str, Any]],
    detector: Detector,
    classifier: ColorClassifier,
    options: VerdictOptions = PUBLISHED_OPTIONS,
    background: str = BACKGROUND,
    cropped: bool = True,
) -> list[Judgement]:
    """The verdict on each picture with its prompt's metadata.

    `background` and `cropped` are those of `crops.crop`. Detections that score less than every threshold are left out,
    since they change no verdict.

    Raises:
        InputError: `check_metadata` refuses metadata, or `size_problem` refuses a picture.
        DeviceError: memory runs out.
    """
    found = detector.detect(images, least_score=min(options.threshold, options.counting_threshold))
    wanted = [
        [(name, number) for name, numbers in color_calls(record, one.boxes, options) for number in numbers]
        for record, one in zip(metadata, found, strict=True)
    ]
    crops = [
        crop(image, one.boxes[name][number], one.masks[name][number], background, cropped)
        for image, one, asked in zip(images, found, wanted, strict=True)
        for name, number in dict.fromkeys(asked)
    ]
    names = [name for asked in wanted for name, _ in dict.fromkeys(asked)]
    tints = iter(classifier.classify(crops, names))
    judgements = []
    for record, one, asked in zip(metadata, found, wanted, strict=True):
        colors = {key: next(tints) for key in dict.fromkeys(asked)}

        def classify(name: str, numbers: list[int], colors: Mapping[tuple[str, int], str] = colors) -> list[str]:
            return [colors[name, number] for number in numbers]

        kept = keep(record, one.boxes, options)
        judgements.append(Judgement(verdict(record, one.boxes, classify, options), one, kept, colors))
    return judgements
