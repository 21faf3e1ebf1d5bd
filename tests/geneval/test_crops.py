"""Crops: the recorded ones of the original evaluator, to the bit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scale_rae.errors import InputError
from scale_rae.geneval import crop
from tests.helpers.made_checkpoints import GOLDENS

RECORD = json.loads((GOLDENS / "geneval" / "crops.json").read_text())
ARRAYS = np.load(GOLDENS / "geneval" / "crops.npz")


def picture(case: dict[str, Any]) -> Image.Image:
    return Image.fromarray(ARRAYS[f"picture.{case['picture']}"])


def mask(case: dict[str, Any]) -> np.ndarray | None:
    if case["mask"] == "none":
        return None
    width, height = case["picture_wh"]
    bits = np.unpackbits(ARRAYS[f"{case['index']}.mask"], count=width * height)
    return bits.reshape(height, width).astype(bool)


@pytest.mark.parametrize("case", RECORD["crops"], ids=lambda case: case["what"])
def test_recorded_crops(case: dict[str, Any]) -> None:
    given = crop(picture(case), np.array(case["box"], np.float32), mask(case))
    assert list(given.size) == case["crop_wh"]
    np.testing.assert_array_equal(np.asarray(given), ARRAYS[f"{case['index']}.crop"])


def test_options_and_alpha() -> None:
    case = RECORD["crops"][1]
    kept = crop(picture(case), case["box"], mask(case), background="original")
    np.testing.assert_array_equal(np.asarray(kept), ARRAYS["option.background_original.crop"])
    whole = crop(picture(case), case["box"], mask(case), cropped=False)
    np.testing.assert_array_equal(np.asarray(whole), ARRAYS["option.no_crop.crop"])
    case = RECORD["crops"][0]
    with_alpha = crop(Image.fromarray(ARRAYS["mode.rgba.picture"]), case["box"], mask(case))
    np.testing.assert_array_equal(np.asarray(with_alpha), ARRAYS["mode.rgba.crop"])


def test_bad_input_is_named() -> None:
    image = Image.new("RGB", (8, 6))
    assert crop(image, (0, 0, 0, 0), None).size == (0, 0)
    with pytest.raises(InputError, match="ends before it begins"):
        crop(image, (5, 0, 4, 3), None)
    with pytest.raises(InputError, match=r"a mask \[8, 6\]"):
        crop(image, (0, 0, 4, 3), np.zeros((8, 6), bool))
    with pytest.raises(InputError, match="background 'gray9000'"):
        crop(image, (0, 0, 4, 3), np.zeros((6, 8), bool), background="gray9000")
