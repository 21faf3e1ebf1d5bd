"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): does a picture show the objects, numbers, colours and places its prompt names?

A detector finds objects, a classifier names their colours, and rules compare both with the prompt's metadata:

    found = Detector("mask2former.pth").detect([image])[0]
    crops = lambda name, numbers: [crop(image, found.boxes[name][i], found.masks[name][i]) for i in numbers]
    verdict(metadata, found.boxes, lambda name, numbers: colors.classify_colors(crops(name, numbers), name))

Each step agrees with the original evaluator. Importing this package loads no torch; `Detector` and `ColorClassifier` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scale_rae.geneval.crops import crop
from scale_rae.geneval.verdicts import CLASSES, COLORS, Verdict, VerdictOptions, check_metadata, color_calls, verdict

if TYPE_CHECKING:
    from scale_rae.geneval.colors import ColorClassifier
    from scale_rae.geneval.detector import Detections, Detector

__all__ = [
    "CLASSES",
    "COLORS",
    "ColorClassifier",
    "Detections",
    "Detector",
    "Verdict",
    "VerdictOptions",
    "check_metadata",
    "color_calls",
    "crop",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name == "ColorClassifier":
        from scale_rae.geneval.colors import ColorClassifier

        return ColorClassifier
    if name in ("Detections", "Detector"):
        from scale_rae.geneval import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'scale_rae.geneval' has no attribute {name!r}")
