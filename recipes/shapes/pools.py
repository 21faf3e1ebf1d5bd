"""Pictures and latents of many scenes, made once on the device and kept there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.shapes import invented, spoilt
from recipes.shapes.networks import image_tokens, latent_of, normalised
from recipes.shapes.settings import Preset
from scale_rae.shapes.draw import draw
from scale_rae.shapes.world import SceneBatch


def image_pool(scenes: SceneBatch, preset: Preset, device: torch.device, chunk: int = 8192) -> Tensor:
    """uint8 [N, 3, H, W] pictures on the device."""
    pool = torch.empty(len(scenes), 3, preset.image, preset.image, dtype=torch.uint8, device=device)
    for start in range(0, len(scenes), chunk):
        pool[start : start + chunk] = draw(scenes[start : start + chunk], device, preset.image, atlas=invented.atlas())
    return pool


@torch.no_grad()
def latents_of_images(siglip: Any, images: Tensor, chunk: int = 4096) -> Tensor:
    """Latents [N, L·C] bfloat16 of uint8 pictures, computed in the encoder's own dtype."""
    parts = []
    for start in range(0, len(images), chunk):
        latents = latent_of(image_tokens(siglip, normalised(images[start : start + chunk])))
        parts.append(latents.flatten(1).bfloat16())
    return torch.cat(parts)


def latent_pool(
    siglip: Any,
    scenes: SceneBatch,
    preset: Preset,
    device: torch.device,
    second: SceneBatch | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Latents [N, L·C] bfloat16 of scenes; the pictures are not kept. Where `second` has other colours, pictures mix both."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(len(scenes), preset.tokens * preset.channels, dtype=torch.bfloat16, device=device)
    for start in range(0, len(scenes), chunk):
        images = draw(scenes[start : start + chunk], device, preset.image, atlas=invented.atlas())
        if second is not None:
            rows = start + np.flatnonzero(spoilt.which(scenes[start : start + chunk], second[start : start + chunk]))
            others = draw(second[rows], device, preset.image, atlas=invented.atlas())
            at = torch.from_numpy(rows - start).to(device)
            images[at] = spoilt.mixed(images[at], others, generator)
        pool[start : start + chunk] = latents_of_images(siglip, images, chunk)
    return pool
