"""Pictures as only a network draws them: an object in two colours. No prompt describes one.

Where a prompt names no colour, parts of a drawing can each settle on another. A reader that learns from drawn scenes alone never
sees that, and says yes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scale_rae.shapes import world
from scale_rae.shapes.world import SceneBatch

SHARE = 0.12  # of the scenes that are read or matched
COARSE = 16  # px: a seam often runs along the borders of latent tokens


def recolored(rng: np.random.Generator, scenes: SceneBatch, may: NDArray[np.bool_]) -> SceneBatch:
    """The scenes, a share `SHARE` of those that `may` [N] with one object in another colour; nothing held out comes about."""
    n, places = scenes.shape.shape
    chosen = may & (rng.random(n) < SHARE)
    there = scenes.shape >= 0
    first = np.arange(places) == (rng.random(n) * there.sum(1)).astype(int)[:, None]
    change = chosen[:, None] & first
    color = (scenes.color + rng.integers(1, len(world.COLORS), there.shape)) % len(world.COLORS)
    change &= ~_held_out()[color, scenes.shape.clip(0, len(world.SHAPES) - 1)]
    rgb = world.PALETTE[color] + rng.uniform(-world.JITTER, world.JITTER, scenes.rgb.shape).astype(np.float32)
    return dataclasses.replace(
        scenes,
        color=np.where(change, color, scenes.color).astype(np.int8),
        rgb=np.where(change[:, :, None], rgb.clip(0, 1), scenes.rgb).astype(np.float32),
    )


def which(scenes: SceneBatch, second: SceneBatch) -> NDArray[np.bool_]:
    """[N], whether the second colours differ."""
    differs: NDArray[np.bool_] = (scenes.color != second.color).any(1)
    return differs


def _held_out() -> NDArray[np.bool_]:
    """[colours, shapes], whether the pair is held out."""
    return np.array(
        [
            [world.shows_held_out([world.Object(shape, color, 0, 0, 0)]) for shape in world.SHAPES]
            for color in world.COLORS
        ]
    )


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
    coarse = (kind < 1 / 3)[:, None, None]
    at_y, at_x = (
        torch.where(coarse, axis.div(COARSE, rounding_mode="floor") * COARSE + COARSE / 2, axis) for axis in (y, x)
    )
    dy, dx = at_y - center_y[:, None, None], at_x - center_x[:, None, None]
    angle = (angle * 2 * torch.pi)[:, None, None]
    side = dx * angle.cos() + dy * angle.sin() > 0
    across = dy * angle.cos() - dx * angle.sin() > 0
    side = side ^ (across & (kind > 2 / 3)[:, None, None])
    # A coarse seam can miss the object: then a straight one.
    share = (side & differs).sum((1, 2)) / total
    missed = ((share < 0.25) | (share > 0.75))[:, None, None]
    dy, dx = y - center_y[:, None, None], x - center_x[:, None, None]
    side = torch.where(missed, dx * angle.cos() + dy * angle.sin() > 0, side)
    return torch.where(side[:, None], first, second)
