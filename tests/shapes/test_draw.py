"""Pictures show the scenes they were drawn from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scale_rae.shapes import draw, world
from scale_rae.shapes.world import SCENE_KINDS, SHAPES


def test_objects_have_their_colour_and_the_rest_is_background() -> None:
    scenes = world.sample(np.random.default_rng(0), 200, SCENE_KINDS, "any")
    pictures = draw.draw(scenes, as_float=True).permute(0, 2, 3, 1).numpy()
    assert pictures.shape == (200, 128, 128, 3)
    y, x = np.mgrid[:128, :128] + 0.5
    for picture, shape, center, radius, rgb, back in zip(
        pictures, scenes.shape, scenes.center, scenes.radius, scenes.rgb, scenes.back, strict=True
    ):
        empty = np.ones((128, 128), dtype=bool)
        for s, (cx, cy), r, color in zip(shape, center, radius, rgb, strict=True):
            if s < 0:
                continue
            away = np.hypot(x - cx, y - cy)
            empty &= away > 1.03 * r + 1
            middle = (away > 0.62 * r) & (away < 0.78 * r) if SHAPES[s] == "ring" else away < 0.2 * r
            assert abs(picture[middle] - color).max() < 0.01
        low, high = back.min(0) - 1e-5, back.max(0) + 1e-5
        assert ((picture[empty] >= low) & (picture[empty] <= high)).all()


def test_a_ring_has_a_hole_and_tilt_turns() -> None:
    scenes = world.sample(np.random.default_rng(1), 1, ("single_object",))
    ring = replace(scenes, shape=np.array([[SHAPES.index("ring"), -1, -1, -1]], dtype=np.int8))
    picture = draw.draw(ring, as_float=True)[0]
    x, y = (int(value) for value in ring.center[0, 0])
    assert (picture[:, y, x] > 0.8).all()
    square = replace(scenes, shape=np.array([[SHAPES.index("square"), -1, -1, -1]], dtype=np.int8))
    turned = replace(square, tilt=square.tilt * 0 + 0.2)
    assert not torch.equal(draw.draw(turned), draw.draw(replace(square, tilt=square.tilt * 0)))


def test_same_scene_same_picture_in_any_batch_and_size() -> None:
    scenes = world.sample(np.random.default_rng(2), 2 * draw.CHUNK_CPU + 3, SCENE_KINDS)
    pictures = draw.draw(scenes)
    assert pictures.dtype == torch.uint8
    last = len(scenes) - 1
    assert torch.equal(draw.draw(scenes[last:])[0], pictures[last])
    large = draw.draw(scenes[:8], size=256, as_float=True)
    small = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - draw.draw(scenes[:8], as_float=True)).abs().mean() < 2e-3
    assert draw.draw(scenes[:0]).shape == (0, 3, 128, 128)


def test_to_pil_has_the_pixels_of_draw() -> None:
    scenes = world.sample(np.random.default_rng(3), 3)
    for image, picture in zip(draw.to_pil(scenes), draw.draw(scenes), strict=True):
        assert np.array_equal(np.asarray(image), picture.permute(1, 2, 0).numpy())


@pytest.mark.gpu
def test_gpu_draws_the_same() -> None:
    scenes = world.sample(np.random.default_rng(4), 3000, SCENE_KINDS)
    difference = draw.draw(scenes, "cuda").cpu().int() - draw.draw(scenes).int()
    assert difference.abs().max() <= 1
