"""Spoilt pictures, with an object in two colours, as only a network draws them. No prompt is true of one.

If a prompt names no colour, a network may give two parts of one object different colours. A language model that learns only from
correct scenes never sees such objects, and says yes to them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scale_rae.shapes import world
from scale_rae.shapes.world import SceneBatch

SHARE = 0.12  # of the scenes read or matched that hold nothing invented
COARSE = 16  # px: a seam often runs along the borders of latent tokens


def recolored(rng: np.random.Generator, scenes: SceneBatch, may: NDArray[np.bool_]) -> SceneBatch:
    """The scenes, a share `SHARE` of those that `may` [N] with one object in another colour; nothing held out comes about."""
    n, places = scenes.shape.shape
    chosen = may & (rng.random(n) < SHARE)
    place = (rng.random(n) * (scenes.shape >= 0).sum(1)).astype(int)
    color = (scenes.color + rng.integers(1, len(world.COLORS), scenes.color.shape)) % len(world.COLORS)
    change = chosen[:, None] & (np.arange(places) == place[:, None]) & ~world.is_color_shape(color, scenes.shape)
    return dataclasses.replace(
        scenes,
        color=np.where(change, color, scenes.color).astype(np.int8),
        rgb=np.where(change[:, :, None], world.tints(rng, color), scenes.rgb),
    )


def which(scenes: SceneBatch, second: SceneBatch) -> NDArray[np.bool_]:
    """[N], whether the second colours differ."""
    differs: NDArray[np.bool_] = (scenes.color != second.color).any(1)
    return differs


def mixed(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [N, 3, H, W] uint8 that are the first on one side of a seam through what differs, the second on the other. A third
    of the seams run along the borders of `COARSE` pixels, a third cross with another, a third are straight."""
    n, _, height, width = first.shape
    differs = (first.int() - second.int()).abs().sum(1) > 30  # [N, H, W]
    device = first.device
    y, x = torch.meshgrid(*(torch.arange(size, device=device) + 0.5 for size in (height, width)), indexing="ij")
    weight = differs.float()
    total = weight.sum((1, 2)).clamp_min(1)
    center_y, center_x = ((weight * axis).sum((1, 2)) / total for axis in (y, x))
    angle, kind = (torch.rand(n, generator=generator).to(device) for _ in range(2))
    angle = (angle * 2 * torch.pi)[:, None, None]
    coarse, crossed = (where[:, None, None] for where in (kind < 1 / 3, kind > 2 / 3))

    def beyond(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether points lie beyond the seam, and beyond one that crosses it."""
        dy, dx = y - center_y[:, None, None], x - center_x[:, None, None]
        return dx * angle.cos() + dy * angle.sin() > 0, dy * angle.cos() - dx * angle.sin() > 0

    at = (torch.where(coarse, axis.div(COARSE, rounding_mode="floor") * COARSE + COARSE / 2, axis) for axis in (y, x))
    side, across = beyond(*at)
    side = side ^ (across & crossed)
    # A coarse seam can miss the object: then a straight one.
    share = (side & differs).sum((1, 2)) / total
    missed = ((share < 0.25) | (share > 0.75))[:, None, None]
    side = torch.where(missed, beyond(y, x)[0], side)
    return torch.where(side[:, None], first, second)
