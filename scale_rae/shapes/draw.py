"""Pictures of scenes: signed distances to each shape, sampled and composited in batches, the same on CPU and GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample

from scale_rae.shapes.world import SHAPES, SIZE, SceneBatch

REACH = 1.3
"""The atlas covers [-REACH, REACH] in units of an object's radius."""
ATLAS_SIZE = 256
CHUNK_CPU, CHUNK_GPU = 64, 2048  # scenes at a time: within a CPU's cache, and some 3 GB of a GPU's memory


def draw(
    scenes: SceneBatch,
    device: str | torch.device = "cpu",
    size: int = SIZE,
    as_float: bool = False,
    atlas: NDArray[np.float32] | None = None,
) -> Tensor:
    """Pictures of the scenes, RGB [N, 3, size, size] on `device`: uint8, or float32 in 0..1 if `as_float`.

    `atlas` [S, ATLAS_SIZE, ATLAS_SIZE] has more pages than the world's (`distance_atlas`) where scenes show other shapes too.
    """
    pages = distance_atlas() if atlas is None else atlas
    device = torch.device(device)
    image = torch.empty(len(scenes), 3, size, size, dtype=torch.float32 if as_float else torch.uint8, device=device)
    step = CHUNK_CPU if device.type == "cpu" else CHUNK_GPU
    for start in range(0, len(scenes), step):
        part = _draw(scenes[start : start + step], device, size, pages)
        image[start : start + step] = part if as_float else part.mul_(255).round_()
    return image


def to_pil(scenes: SceneBatch, size: int = SIZE) -> list[Image.Image]:
    """Pictures of the scenes as PIL images of size x size."""
    return [Image.fromarray(pixels) for pixels in draw(scenes, size=size).permute(0, 2, 3, 1).numpy()]


def _draw(scenes: SceneBatch, device: torch.device, size: int, pages: NDArray[np.float32]) -> Tensor:
    """Float pictures [N, 3, size, size] in 0..1 of one chunk."""

    def tensor(values: NDArray[np.floating | np.integer]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (SIZE / size)  # pixel centres in scene px
    y, x = axis[:, None], axis[None, :]

    angle = tensor(scenes.back_angle)[:, None, None]
    along = (x - SIZE / 2) * angle.cos() + (y - SIZE / 2) * angle.sin()  # [N, size, size], px from the middle
    first, second = tensor(scenes.back)[:, :, :, None, None].unbind(1)  # [N, 3, 1, 1]
    image = torch.lerp(first, second, (0.5 + along / (SIZE * math.sqrt(2)))[:, None])
    back = image.clone()

    atlas = torch.from_numpy(pages).to(device)
    for number in range(len(pages)):
        scene, place = np.nonzero(scenes.shape == number)
        if not scene.size:
            continue
        radius, tilt = (tensor(values[scene, place])[:, None, None] for values in (scenes.radius, scenes.tilt))
        center = tensor(scenes.center[scene, place])[:, :, None, None]  # [M, 2, 1, 1]
        dx, dy = (x - center[:, 0]) / radius, (y - center[:, 1]) / radius  # [M, 1, size], [M, size, 1]
        grid = torch.stack((dx * tilt.cos() + dy * tilt.sin(), dy * tilt.cos() - dx * tilt.sin()), -1) / REACH
        # All M objects share one atlas page: stack their rows into one tall grid.
        distance = grid_sample(
            atlas[number][None, None], grid.flatten(0, 1)[None], padding_mode="border", align_corners=True
        ).view(-1, size, size)
        alpha = (0.5 - distance * radius * (size / SIZE)).clamp_(0, 1)[:, None]  # [M, 1, size, size], by distance in px
        # Objects are apart, so that adding each one's change is compositing.
        rows = tensor(scene)
        image.index_add_(0, rows, alpha * (tensor(scenes.rgb[scene, place])[:, :, None, None] - back[rows]))
    return image.clamp_(0, 1)


@functools.cache
def distance_atlas() -> NDArray[np.float32]:
    """Signed distance to each of `SHAPES`, [8, ATLAS_SIZE, ATLAS_SIZE], negative inside, in units of the radius; first and last
    sample of each axis lie at -REACH and REACH, y downwards."""
    x, y = _atlas_grid()
    from_middle = np.hypot(x, y)
    pages: dict[str, NDArray[np.floating]] = {
        "circle": from_middle - 0.88,
        "ring": np.abs(from_middle - 0.70) - 0.24,
    }
    outlines = _outlines()
    pages |= dict(zip(outlines, polygon_pages(list(outlines.values())), strict=True))
    return np.stack([pages[name] for name in SHAPES]).astype(np.float32)


def polygon_pages(outlines: Sequence[NDArray[np.float64]]) -> NDArray[np.float32]:
    """Pages of the atlas [S, ATLAS_SIZE, ATLAS_SIZE] for closed polygons of corners [n, 2], in units of the radius."""
    x, y = _atlas_grid()
    return np.stack([_polygon_distance(outline, x, y) for outline in outlines]).astype(np.float32)


def _atlas_grid() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    axis = np.linspace(-REACH, REACH, ATLAS_SIZE, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _outlines() -> dict[str, NDArray[np.float64]]:
    """Corners [n, 2] of the shapes that are polygons (the heart is a fine one), within the unit circle, y downwards."""
    up = -math.pi / 2
    tips = up + np.arange(10) * math.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.46)
    corners = up + np.arange(3) * 2 * math.pi / 3
    t = np.linspace(0, 2 * math.pi, 160, endpoint=False)
    heart_y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    heart = np.stack((16 * np.sin(t) ** 3, -heart_y - 2.5), 1)
    long, thick = 0.95, 0.31
    quarter = np.array([[thick, thick], [thick, long], [-thick, long]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return {
        "square": 0.72 * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]),
        "triangle": np.stack((np.cos(corners), np.sin(corners)), 1),
        "star": reach[:, None] * np.stack((np.cos(tips), np.sin(tips)), 1),
        "heart": heart / np.hypot(*heart.T).max(),
        "cross": np.concatenate([quarter @ np.linalg.matrix_power(turn, n) for n in range(4)]),
        "diamond": np.array([[0.0, -1.0], [0.62, 0.0], [0.0, 1.0], [-0.62, 0.0]]),
    }


def _polygon_distance(
    outline: NDArray[np.float64], x: NDArray[np.float32], y: NDArray[np.float32]
) -> NDArray[np.floating]:
    """Signed distance from the points (x, y) to a closed polygon, negative inside (even-odd rule)."""
    nearest = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clip(0, 1)
        np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey), out=nearest)
        if ey:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (ex / ey))
    return np.where(inside, -nearest, nearest)
