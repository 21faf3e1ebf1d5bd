"""GenEval: does a picture show the objects, numbers, colours and places that its prompt names?

Source: Ghosh et al. 2023, arXiv:2310.11513. A detector finds objects, a classifier names their colours, and rules compare both
with the prompt's metadata:

    detector, classifier = Detector("mask2former.pth"), ColorClassifier()
    judge([image], [metadata], detector, classifier)[0].verdict

Each step agrees with the original evaluator. Importing this package loads no torch; `Detector` and `ColorClassifier` do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scale_rae.geneval.crops import crop
from scale_rae.geneval.verdicts import (
    CLASSES,
    COLORS,
    Verdict,
    VerdictOptions,
    check_metadata,
    color_calls,
    keep,
    verdict,
)

if TYPE_CHECKING:
    from scale_rae.geneval.colors import ColorClassifier
    from scale_rae.geneval.detector import Detections, Detector
    from scale_rae.geneval.judging import Judgement, judge

__all__ = [
    "CLASSES",
    "COLORS",
    "ColorClassifier",
    "Detections",
    "Detector",
    "Judgement",
    "Verdict",
    "VerdictOptions",
    "check_metadata",
    "color_calls",
    "crop",
    "judge",
    "keep",
    "verdict",
]


_NEED_TORCH = {
    "ColorClassifier": "colors",
    "Detections": "detector",
    "Detector": "detector",
    "Judgement": "judging",
    "judge": "judging",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(import_module(f"scale_rae.geneval.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module 'scale_rae.geneval' has no attribute {name!r}")
