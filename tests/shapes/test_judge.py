"""The judge against pictures whose scenes are known."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from scale_rae.shapes import draw, world
from scale_rae.shapes.judge import find_objects, judge
from scale_rae.shapes.world import COLORS, KINDS, PALETTE, SHAPES, Prompt

Pixels = NDArray[np.uint8]


def drawn(scenes: world.SceneBatch) -> Pixels:
    return draw.draw(scenes).permute(0, 2, 3, 1).numpy()


def degraded(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """About what a decoder does to it: blur, noise, JPEG (31 dB)."""
    soft = ndimage.gaussian_filter(picture.astype(np.float32), (1.1, 1.1, 0)) + rng.normal(0, 3, picture.shape)
    file = io.BytesIO()
    Image.fromarray(soft.clip(0, 255).round().astype(np.uint8)).save(file, "JPEG", quality=80)
    return np.asarray(Image.open(file).convert("RGB"))


def rates(pictures: list[Pixels], scenes: world.SceneBatch) -> tuple[float, float]:
    """Share of accepted true prompts, and of accepted prompts with one attribute changed."""
    rng = random.Random(0)
    accepted, wrongly = [], []
    for picture, scene in zip(pictures, scenes, strict=True):
        prompt = next(prompt for prompt in world.true_prompts(scene) if prompt.tag == scene.kind)
        verdict, changed = judge(picture, prompt.metadata()), world.changed(rng, prompt, "any").metadata()
        accepted.append(verdict.correct)
        wrongly.append(all(thing.clear for thing in verdict.objects) and not world.mismatches(changed, verdict.objects))
    return float(np.mean(accepted)), float(np.mean(wrongly))


def test_drawn_scenes() -> None:
    scenes = world.sample(np.random.default_rng(0), 300, KINDS, "any")
    accepted, wrongly = rates(list(drawn(scenes)), scenes)
    assert accepted >= 0.995
    assert wrongly <= 0.005


def test_degraded_scenes() -> None:
    rng = np.random.default_rng(1)
    scenes = world.sample(rng, 200, KINDS, "any")
    accepted, wrongly = rates([degraded(picture, rng) for picture in drawn(scenes)], scenes)
    assert accepted >= 0.99
    assert wrongly <= 0.01


def test_mixed_scenes_are_read_fully() -> None:
    scenes = world.sample(np.random.default_rng(2), 100, ("mixed",), "any")
    for picture, scene in zip(drawn(scenes), scenes, strict=True):
        found = find_objects(picture)
        for seen, there in zip(found, sorted(scene.objects, key=lambda thing: thing.x), strict=True):
            assert (seen.shape, seen.color, seen.clear) == (there.shape, there.color, True)
            assert abs(seen.x - there.x) < 0.2 * there.radius
            assert abs(seen.y - there.y) < 0.2 * there.radius


@pytest.mark.parametrize("size", [64, 100, 256])
def test_other_sizes_and_pil(size: int) -> None:
    scenes = world.sample(np.random.default_rng(3), 60, KINDS, "any")
    for image, scene in zip(draw.to_pil(scenes, size), scenes, strict=True):
        assert judge(image, world.metadata(scene)).correct


def blank(level: int = 240) -> Pixels:
    return np.full((128, 128, 3), level, dtype=np.uint8)


def place(picture: Pixels, shape: str, color: str, x: float, y: float, radius: float = 16) -> Pixels:
    """A copy of the picture with one more object, drawn over what is there."""
    one = world.sample(np.random.default_rng(0), 1, ("single_object",))
    one = replace(
        one,
        shape=np.array([[SHAPES.index(shape), -1, -1, -1]], dtype=np.int8),
        rgb=np.zeros((1, 4, 3), dtype=np.float32),
        back=np.ones((1, 2, 3), dtype=np.float32),
        center=np.full((1, 4, 2), (x, y), dtype=np.float32),
        radius=np.full((1, 4), radius, dtype=np.float32),
    )
    cover = 1 - draw.draw(one, as_float=True)[0].permute(1, 2, 0).numpy()
    return (picture * (1 - cover) + 255 * PALETTE[COLORS.index(color)] * cover).round().astype(np.uint8)


CIRCLE = Prompt("single_object", ("circle",)).metadata()


def reason(picture: Pixels, metadata: dict[str, Any] = CIRCLE) -> str:
    verdict = judge(picture, metadata)
    assert verdict.correct == (verdict.reason == "")
    return verdict.reason


def test_objects_in_a_file_are_those_of_its_pixels(tmp_path: Path) -> None:
    picture = drawn(world.sample(np.random.default_rng(5), 1))[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert find_objects(tmp_path / "a.png") == find_objects(str(tmp_path / "a.png")) == find_objects(picture) != ()


def test_an_empty_picture_shows_nothing() -> None:
    assert find_objects(blank()) == ()
    assert reason(blank()) == "expected circle>=1, found 0"


def test_something_extra_is_an_error() -> None:
    one = place(blank(), "circle", "red", 30, 30)
    assert reason(one) == ""
    assert reason(place(one, "circle", "red", 90, 90)) == "expected circle<2, found 2"
    assert reason(place(one, "star", "blue", 90, 90)) == "expected no star, found 1"
    assert reason(place(one, "star", "blue", 90, 90, radius=7)) != ""


def test_noise_is_not() -> None:
    one = place(blank(), "circle", "red", 30, 30)
    one[100:103, 100:103] = 0
    assert reason(one) == ""


def test_touching_objects() -> None:
    touching = place(place(blank(), "circle", "red", 40, 60), "square", "blue", 66, 60)
    pair = Prompt("color_attr", ("circle", "square"), ("red", "blue"))
    assert reason(touching, pair.metadata()) == ""
    assert reason(touching, pair._replace(colors=("blue", "red")).metadata()) != ""
    merged = place(place(blank(), "circle", "red", 40, 60), "circle", "red", 64, 60)
    assert "unclear red object" in reason(merged)


def test_what_is_no_shape_or_colour_is_unclear() -> None:
    blob = blank()
    blob[40:80, 20:100] = (15, 102, 235)
    assert "unclear blue object" in reason(blob)
    half = place(blank(), "circle", "red", 64, 64, radius=25)
    half[64:, :] = np.where(half[64:, :, 1:2] < 100, np.array([20, 100, 235], dtype=np.uint8), half[64:, :])
    assert reason(half) != ""
    grey = place(blank(), "circle", "red", 64, 64, radius=25)
    grey[grey[:, :, 1] < 200] = (140, 140, 140)
    assert "unclear" in reason(grey)


def test_noise_and_flat_pictures_do_not_break_it() -> None:
    static = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for picture in (static, blank(0), blank(255), np.repeat(static[:, :, :1], 3, 2)):
        assert not judge(picture, CIRCLE).correct


def test_bad_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        find_objects(np.zeros((128, 64, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="64"):
        find_objects(Image.new("RGB", (32, 32)))
    with pytest.raises(ValueError, match="uint8"):
        find_objects(np.zeros((128, 128, 3)))
    with pytest.raises(ValueError, match="uint8"):
        find_objects(np.zeros((128, 128), dtype=np.uint8))
