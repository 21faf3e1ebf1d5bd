"""From pictures to verdicts: a batch of pictures is judged as each picture alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scale_rae.geneval import CLASSES, COLORS, ColorClassifier, Detector, VerdictOptions, crop, judge
from tests.geneval.test_detector import SCALE, picture
from tests.helpers.made_geneval import small_architecture, write_clip, write_detector

OPTIONS = VerdictOptions(threshold=0.02, counting_threshold=0.03)  # made-up weights score low


def test_a_batch_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector(
        str(write_detector(tmp_path / "small.pth")), "cpu", architecture=small_architecture(), scale=SCALE
    )
    classifier = ColorClassifier(str(write_clip(tmp_path / "clip")), "cpu")
    images = [picture("a"), picture("b")]
    boxes = [found.boxes for found in detector.detect(images)]
    seen = [max(found, key=lambda name, found=found: float(found[name][:, 4].max())) for found in boxes]
    bench = classifier.columns("bench")  # one of the classes that the made-up tokenizer has words for
    monkeypatch.setattr(classifier, "columns", lambda name: bench)
    metadata: list[dict[str, Any]] = [
        {"tag": "colors", "include": [{"class": seen[0], "count": 1, "color": color} for color in ("red", "pink")]},
        {"tag": "counting", "include": [{"class": seen[1], "count": 1}], "exclude": [{"class": seen[1], "count": 2}]},
    ]
    together = judge(images, metadata, detector, classifier, OPTIONS)
    for image, record, judgement in zip(images, metadata, together, strict=True):
        (alone,) = judge([image], [record], detector, classifier, OPTIONS)
        assert (alone.verdict.correct, alone.verdict.reason) == (judgement.verdict.correct, judgement.verdict.reason)
        assert list(judgement.verdict.details) == [name for name in CLASSES if name in judgement.kept]
        for name, numbers in judgement.kept.items():
            assert judgement.detections.boxes[name][numbers].tolist() == judgement.verdict.details[name]
    ((key, color),) = together[0].colors.items()  # asked for twice, found once
    name, number = key
    found = together[0].detections
    part = crop(images[0], found.boxes[name][number], found.masks[name][number])
    assert (name, color) == (seen[0], classifier.classify_colors([part], name)[0])
    assert color in COLORS
    assert together[1].colors == {}
