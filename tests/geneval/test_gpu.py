"""What only a GPU can show of GenEval's networks: that they agree there with the recordings, which were made on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from scale_rae.geneval import ColorClassifier, Detector
from scale_rae.geneval import detector as steps
from tests.geneval.test_colors import ARRAYS as COLOR_ARRAYS
from tests.geneval.test_colors import COLOR, PARTS
from tests.geneval.test_detector import ARRAYS, SCALE, picture, rows
from tests.helpers.made_geneval import small_architecture, write_clip, write_detector

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    file = write_detector(tmp_path_factory.mktemp("detector") / "small.pth")
    return Detector(str(file), "cuda", architecture=small_architecture(), scale=SCALE)


@pytest.mark.parametrize("name", ["a", "b"])
def test_recorded_detections(detector: Detector, name: str) -> None:
    size = steps.resized_size(*picture(name).size, SCALE)
    resized = steps.resize(torch.from_numpy(ARRAYS[f"{name}.picture"]).cuda(), *size)
    np.testing.assert_array_equal(resized.cpu().numpy(), ARRAYS[f"{name}.resized"])
    classes, masks = detector.outputs([picture(name)])
    np.testing.assert_allclose(classes[0].cpu().numpy(), ARRAYS[f"{name}.cls_pred"], atol=1e-4)
    np.testing.assert_allclose(masks[0, :, ::2, ::2].cpu().numpy(), ARRAYS[f"{name}.mask_pred_every2"], atol=1e-4)
    found = rows(detector.detect([picture(name)])[0])
    boxes = ARRAYS[f"{name}.boxes"]
    order = np.argsort(-boxes[:, 4], kind="stable")
    assert [label for label, _, _ in found] == ARRAYS[f"{name}.labels"][order].tolist()
    given = np.stack([box for _, box, _ in found])
    np.testing.assert_array_equal(given[:, :4], boxes[order, :4])
    np.testing.assert_allclose(given[:, 4], boxes[order, 4], atol=1e-5)


def test_batches_agree_with_single_pictures(detector: Detector) -> None:
    images = [picture("b"), picture("a"), picture("b")]
    for found, image in zip(detector.detect(images, batch_size=3), images, strict=True):
        (alone,) = detector.detect([image])
        assert [row[0] for row in rows(found)] == [row[0] for row in rows(alone)]


def test_recorded_colors(tmp_path: Path) -> None:
    classifier = ColorClassifier(str(write_clip(tmp_path / "clip")), "cuda")
    recorded = COLOR["end_to_end"]
    assert classifier.classify_colors(PARTS, recorded["class"]) == [recorded["crops"][str(i)] for i in range(14)]
    logits = np.stack(classifier.logits(PARTS, [recorded["class"]] * 14))
    expected = np.concatenate([COLOR_ARRAYS["end_to_end.small.logits"], COLOR_ARRAYS["end_to_end.large.logits"]])
    np.testing.assert_allclose(logits, expected, atol=1e-4)
