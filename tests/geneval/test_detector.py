"""The detector: recorded pictures, inputs, outputs and detections of a reduced Mask2Former; the forms of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scale_rae.errors import CheckpointError, ConfigError, InputError, OutputError, ScaleRAEError
from scale_rae.geneval import CLASSES, Detections, Detector
from scale_rae.geneval import detector as steps
from scale_rae.geneval.mask2former import convert, load, published_layout
from scale_rae.geneval.published import CONVERTED_FROM, DETECTOR_FILE, DETECTOR_SHA256
from tests.helpers.made_geneval import FOLDER, record, small_architecture, write_detector

CASE, ARRAYS = record("mask2former"), np.load(FOLDER / "mask2former.npz")
SCALE = tuple(CASE["config"]["img_scale"])
OLD_NAMES = {  # transformers' before 5.17
    "encoder.swin.": "encoder.",
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.relative_position_bias.": "attention.self.",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "small.pth")


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    convert(file, file.parent / "converted", small_architecture())
    return file.parent / "converted"


@pytest.fixture(scope="module")
def detector(file: Path) -> Detector:
    return Detector(str(file), "cpu", architecture=small_architecture(), scale=SCALE)


def picture(name: str) -> Image.Image:
    return Image.fromarray(ARRAYS[f"{name}.picture"])


def rows(found: Detections) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Label, box and mask of each detection, by descending score."""
    listed = [
        (CLASSES.index(name), box, mask)
        for name, boxes in found.boxes.items()
        for box, mask in zip(boxes, found.masks[name], strict=True)
    ]
    return sorted(listed, key=lambda row: -row[1][4])


def same(one: Detections, other: Detections) -> bool:
    """Whether two results agree but for the last digits of scores."""
    pairs = list(zip(rows(one), rows(other), strict=True))
    return all(a[0] == b[0] and np.allclose(a[1], b[1], atol=1e-5) and (a[2] == b[2]).all() for a, b in pairs)


def test_published_tensors() -> None:
    full = {name: tuple(shape) for name, shape in CASE["published_tensors"].items()}
    assert published_layout() == full
    assert published_layout(small_architecture()) == {name: tuple(shape) for name, shape in CASE["tensors"].items()}


@pytest.mark.parametrize("name", ["a", "b"])
def test_recorded_pictures(detector: Detector, name: str) -> None:
    size = steps.resized_size(*picture(name).size, SCALE)
    resized = steps.resize(torch.from_numpy(ARRAYS[f"{name}.picture"]), *size)
    np.testing.assert_array_equal(resized.numpy(), ARRAYS[f"{name}.resized"])
    pixels = steps.network_input([resized], steps.padded_size(*size))[0].numpy()
    edges = {"input_row0": pixels[:, 0], "input_last_row": pixels[:, -1], "input_last_column": pixels[:, :, -1]}
    for edge, values in edges.items():
        np.testing.assert_allclose(values, ARRAYS[f"{name}.{edge}"], atol=1e-6)
    classes, masks = detector.outputs([picture(name)])
    np.testing.assert_allclose(classes[0].numpy(), ARRAYS[f"{name}.cls_pred"], atol=1e-4)
    np.testing.assert_allclose(masks[0, :, ::2, ::2].numpy(), ARRAYS[f"{name}.mask_pred_every2"], atol=1e-4)


@pytest.mark.parametrize("name", ["a", "b"])
def test_recorded_detections(detector: Detector, name: str) -> None:
    found = rows(detector.detect([picture(name)])[0])
    boxes = ARRAYS[f"{name}.boxes"]
    order = np.argsort(-boxes[:, 4], kind="stable")
    assert [label for label, _, _ in found] == ARRAYS[f"{name}.labels"][order].tolist()
    given = np.stack([box for _, box, _ in found])
    np.testing.assert_array_equal(given[:, :4], boxes[order, :4])
    np.testing.assert_allclose(given[:, 4], boxes[order, 4], atol=1e-5)
    height, width = CASE["pictures"][name]["mask_shape"]
    masks = np.unpackbits(ARRAYS[f"{name}.masks_packed"], axis=1, count=height * width).reshape(-1, height, width)
    expected = masks[ARRAYS[f"{name}.mask_index"][order]].astype(bool)
    assert (np.stack([mask for _, _, mask in found]) != expected).sum() <= 2  # pixels on an edge may flip


def test_published_pipeline() -> None:
    for key, shape in CASE["pipelines_at_1333x800"].items():
        width, height = shape["size_wh"]
        size = steps.resized_size(width, height)
        padded = steps.padded_size(*size)
        assert ([*size[::-1], 3], [3, *padded[::-1]]) == (shape["img_shape"], shape["input_shape"])
        if f"pipeline.{key}.row0" in ARRAYS:
            x, y = np.meshgrid(np.arange(width), np.arange(height))
            planes = (x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2))
            resized = steps.resize(torch.from_numpy(np.stack(planes, -1).astype(np.uint8)), *size)
            pixels = steps.network_input([resized], padded)[0].numpy()
            for row in (0, 301):
                np.testing.assert_allclose(pixels[:, row], ARRAYS[f"pipeline.{key}.row{row}"], atol=1e-6)


def test_pictures_of_many_sizes_in_batches(detector: Detector) -> None:
    tall = picture("b").resize((91, 140))  # the same padded size as b, another one before padding
    images = [picture("b"), picture("a"), tall]
    together = detector.detect(images, batch_size=3)
    assert all(same(found, detector.detect([image])[0]) for found, image in zip(together, images, strict=True))
    with_alpha = picture("a").copy()
    with_alpha.putalpha(7)
    assert same(detector.detect([with_alpha])[0], together[1])


def test_objects_of_low_scores_are_left_out(detector: Detector) -> None:
    every = rows(detector.detect([picture("a")])[0])
    least = float(every[30][1][4])
    some = rows(detector.detect([picture("a")], least_score=least)[0])
    kept = [row for row in some if row[1][4] >= least]
    assert len(kept) == 31 <= len(some) < len(every)
    assert all(
        a[0] == b[0] and (a[1] == b[1]).all() and (a[2] == b[2]).all() for a, b in zip(kept, every, strict=False)
    )
    assert detector.detect([picture("a")], least_score=1.0) == [Detections({}, {})]


def test_boxes_of_masks() -> None:
    logits = torch.full((3, 8, 8), -1.0)
    logits[1, 2:5, 3:7] = 1.0
    logits[2] = 1.0
    chances = torch.zeros(3, 81)
    chances[torch.arange(3), torch.tensor([4, 2, 1])] = torch.tensor([9.0, 8.0, 7.0])
    found = steps.detections(chances, logits, (32, 32), (32, 32))
    best = {name: found.boxes[name][0] for name in (CLASSES[4], CLASSES[2], CLASSES[1])}
    assert best[CLASSES[4]].tolist() == [0, 0, 0, 0, 0]  # an empty mask
    assert best[CLASSES[1]][:4].tolist() == [0, 0, 32, 32]
    mask = found.masks[CLASSES[2]][0]
    rows_, columns = np.nonzero(mask)
    assert best[CLASSES[2]][:4].tolist() == [columns.min(), rows_.min(), columns.max() + 1, rows_.max() + 1]
    with pytest.raises(ScaleRAEError, match="not finite"):
        steps.detections(chances * float("nan"), logits, (32, 32), (32, 32))


def test_a_converted_folder_is_the_same_detector(detector: Detector, folder: Path, file: Path) -> None:
    converted = Detector(str(folder), "cpu", scale=SCALE)
    assert all(
        torch.equal(a, b)
        for a, b in zip(detector.outputs([picture("a")]), converted.outputs([picture("a")]), strict=True)
    )
    assert (converted.sha256, converted.comparable) == (detector.sha256, False)
    assert "not comparable with published scores" in converted.note
    with pytest.raises(OutputError, match="exists"):
        convert(file, folder, small_architecture())


def test_old_names_and_comparability(folder: Path, tmp_path: Path, detector: Detector) -> None:
    weights = load_file(folder / "model.safetensors")
    old: dict[str, Any] = {}
    for name, tensor in weights.items():
        renamed = name
        if "pixel_level_module.encoder." in name:
            for theirs, ours in OLD_NAMES.items():
                renamed = renamed.replace(theirs, ours)
        old[renamed] = tensor
    assert len(old) == len(weights)
    assert sum(name not in weights for name in old) > 100
    old |= {"criterion.empty_weight": torch.ones(81)}
    save_file(old, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config[CONVERTED_FROM]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(str(tmp_path))
    assert (loaded.sha256, loaded.comparable) == (None, False)
    state = detector.network.state_dict()
    same_values = [
        torch.equal(value, state[name])
        for name, value in loaded.network.state_dict().items()
        if "swin.layernorm" not in name
    ]
    assert all(same_values)
    (tmp_path / "config.json").write_text(json.dumps(config | {CONVERTED_FROM: {"sha256": DETECTOR_SHA256}}))
    assert load(str(tmp_path)).comparable


def test_other_networks_are_named(file: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"not the network of {DETECTOR_FILE}: of its 625 tensors") as caught:
        Detector(str(file), "cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    other = tmp_path / "mask_rcnn-00000000.pth"
    other.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="its SHA-256 begins with"):
        Detector(str(other), "cpu")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for change, problem in (
        ({"model_type": "maskformer"}, "model_type 'maskformer' is not supported"),
        ({"decoder_layers": 9000}, "decoder_layers is 9000|the weights hold only"),
        ({"backbone_config": config["backbone_config"] | {"depths": [2, 2]}}, r"depths is \[2, 2\]"),
        ({"hidden_dim": 33}, "not usable sizes"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=problem):
            load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_queries": 21}))
    with pytest.raises(CheckpointError, match=r"wrong shapes: .*queries_embedder"):
        load(str(tmp_path))


def test_convolutions_stay_exact(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = detector.network.forward

    def watched(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(torch.backends.cudnn.allow_tf32)
        return forward(pixels)

    monkeypatch.setattr(detector.network, "forward", watched)
    before = torch.backends.cudnn.allow_tf32
    detector.outputs([picture("a")])
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_picture_without_pixels(detector: Detector) -> None:
    with pytest.raises(InputError, match="0 x 0 pixels"):
        detector.detect([Image.new("RGB", (0, 0))])


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1)])
def test_a_picture_too_narrow_for_its_length(detector: Detector, size: tuple[int, int]) -> None:
    """The published sizes make 0 pixels of a picture that is some 2,700 times as long as wide."""
    with pytest.raises(InputError, match=rf"{size[0]} x {size[1]} pixels.*too narrow"):
        detector.detect([Image.new("RGB", size)])
