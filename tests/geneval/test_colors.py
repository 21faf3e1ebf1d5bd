"""The colour classifier: recorded classifiers, logits and colours on a tiny CLIP, CLIP's input, and files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scale_rae.errors import CheckpointError, ConfigError, InputError
from scale_rae.geneval import COLORS, ColorClassifier, crop
from scale_rae.geneval.colors import TEMPLATES, color_columns, embeddings
from scale_rae.rewards.parts import clip_pixels
from tests.geneval.test_crops import ARRAYS as CROPS
from tests.geneval.test_crops import RECORD, mask, picture
from tests.helpers.made_geneval import FOLDER, record, write_clip

COLOR, ARRAYS = record("color"), np.load(FOLDER / "color.npz")
PARTS = [crop(picture(case), case["box"], mask(case)) for case in RECORD["crops"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def classifier(folder: Path) -> ColorClassifier:
    return ColorClassifier(str(folder), "cpu")


def test_clip_input_to_the_bit() -> None:
    for index, part in enumerate(PARTS):
        pixels = clip_pixels(part, 224)
        np.testing.assert_array_equal(pixels[:, ::16, ::16], CROPS[f"{index}.clip224_every16"])
        np.testing.assert_array_equal(pixels[:, 100], CROPS[f"{index}.clip224_row100"])


@torch.inference_mode()
@pytest.mark.parametrize("number", range(len(COLOR["classes"])))
def test_recorded_classifiers_and_logits(classifier: ColorClassifier, number: int) -> None:
    ids = torch.from_numpy(ARRAYS[f"{number}.token_ids"]).long()
    columns = color_columns(classifier.network, ids)
    own = classifier.columns(COLOR["classes"][number])  # through the tokenizer
    for found in (columns, own):
        np.testing.assert_allclose(found.numpy(), ARRAYS[f"{number}.classifier"], atol=1e-6)
    logits = 100 * embeddings(classifier.network, torch.from_numpy(ARRAYS["pixels"])) @ columns
    np.testing.assert_allclose(logits.numpy(), ARRAYS[f"{number}.logits"], atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(1).numpy(), ARRAYS[f"{number}.pred"])


def test_recorded_colors_of_crops(classifier: ColorClassifier) -> None:
    recorded = COLOR["end_to_end"]
    assert classifier.network.config.vision_config.image_size == recorded["transform_size"]
    assert classifier.classify_colors(PARTS, recorded["class"]) == [recorded["crops"][str(i)] for i in range(14)]
    logits = np.stack(classifier.logits(PARTS, [recorded["class"]] * 14))
    expected = np.concatenate([ARRAYS["end_to_end.small.logits"], ARRAYS["end_to_end.large.logits"]])
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_crops_of_many_classes_share_batches(classifier: ColorClassifier) -> None:
    names = ["bench", "traffic light"] * 10  # more than one batch of 16
    parts = [PARTS[i % 10] for i in range(20)]
    together = classifier.logits(parts, names)
    for i in (0, 1, 15, 16, 19):
        np.testing.assert_allclose(together[i], classifier.logits([parts[i]], [names[i]])[0], atol=1e-4)
    assert classifier.classify([], []) == []


def test_colours_and_templates_are_genevals() -> None:
    assert list(COLORS) == COLOR["colors"]
    assert [t.replace("{name}", "{class}") for t in TEMPLATES] == COLOR["templates"]


def test_bad_input_is_named(classifier: ColorClassifier, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 x 0 pixels has no colour"):
        classifier.classify_colors([Image.new("RGB", (0, 0))], "bench")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(ConfigError, match="'siglip' is not clip"):
        ColorClassifier(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no weights"):
        ColorClassifier(str(tmp_path), "cpu")
