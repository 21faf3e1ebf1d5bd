"""The model's own drawings with the judge's verdicts: the errors that only the velocity network makes.

No scene that is drawn by rules looks like them, so a language model that reads only such scenes says yes to most of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.shapes import data
from recipes.shapes.settings import PIXEL_MEAN, PIXEL_STD
from scale_rae import flow
from scale_rae.config import ScaleRAEConfig
from scale_rae.decoder import PixelDecoder, to_uint8
from scale_rae.dit import DiT
from scale_rae.shapes import world
from scale_rae.shapes.world import Object, Prompt, Scene
from scale_rae.training.losses import training_shift

KINDS = (
    *("single_object",) * 12,
    *("colors",) * 2,
    *("counting",) * 4,
    *("two_object",) * 4,
    *("position",) * 4,
    *("color_attr",) * 4,
    *("mixed",) * 5,
)
"""Kinds of prompt, weighted: few prompts name a single object, and its errors are the hardest to see."""
GUIDANCE = (1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Guidance levels of batches, in turn."""
SAMPLER, STEPS = "ab2", 16


@dataclass(frozen=True)
class Wish:
    """What a drawing is asked to show."""

    text: str
    """ "a photo of …"."""
    prompt: Prompt | None
    """Its parts, None for a list of objects."""
    things: tuple[tuple[str, str], ...] = ()
    """The (colour, shape) of each object of a list; "" for any colour."""

    def is_granted(self, objects: Sequence[Object]) -> bool:
        """Whether these objects are all that the wish names."""
        if self.prompt is not None:
            return not world.mismatches(self.prompt.metadata(), objects)
        return len(objects) == len(self.things) and any(
            all(
                color in ("", t.color) and shape == t.shape
                for (color, shape), t in zip(self.things, order, strict=True)
            )
            for order in itertools.permutations(objects)
        )


def wishes(rng: random.Random, scenes: Sequence[Scene]) -> list[Wish]:
    """A wish for each scene, of the kind that it was sampled for."""
    made = []
    for scene in scenes:
        if scene.kind == "mixed":
            things = rng.sample(scene.objects, len(scene.objects))
            pairs = tuple((t.color if rng.random() < data.NAMED_COLOR else "", t.shape) for t in things)
            names = [world.with_article(f"{color} {shape}".strip()) for color, shape in pairs]
            made.append(Wish(f"a photo of {world.listed(names)}", None, pairs))
        else:
            prompt = next(prompt for prompt in world.true_prompts(scene) if prompt.tag == scene.kind)
            made.append(Wish(prompt.text, prompt))
    return made


@dataclass(frozen=True)
class Seen:
    """What the judge finds in a drawing."""

    objects: tuple[Object, ...]
    clear: bool
    """Whether all of them are clearly objects of the world."""


def look(pictures: NDArray[np.uint8]) -> list[Seen]:
    """What the judge finds in each of the pictures [N, H, W, 3]."""
    from scale_rae.shapes.judge import find_objects

    seen = []
    for picture in pictures:
        found = find_objects(picture)
        objects = tuple(Object(thing.shape, thing.color, thing.x, thing.y, 0.0) for thing in found)
        seen.append(Seen(objects, bool(found) and all(thing.clear for thing in found)))
    return seen


@torch.no_grad()
def drawings(
    config: ScaleRAEConfig,
    dit: DiT,
    decoder: PixelDecoder,
    statistics: tuple[Tensor, Tensor],
    conditions: Tensor,
    batch: int,
) -> Iterator[tuple[Tensor, NDArray[np.uint8]]]:
    """Latents [B, L·C] bfloat16 and pictures [B, H, W, 3] of the conditions [N, L, Z], batch by batch.

    Each batch has another level of `GUIDANCE`. `statistics` are the mean and deviation [C] of latents.
    """
    assert dit.null_condition is not None
    sampler = flow.SAMPLERS[SAMPLER]
    times = sampler.schedule(STEPS, training_shift(config))
    side, device = config.dit.side, conditions.device
    mean, std = (value.view(1, 1, -1).to(device) for value in statistics)
    for number, start in enumerate(range(0, len(conditions), batch)):
        condition = conditions[start : start + batch].to(dit.dtype)
        null = dit.null_condition.to(dit.dtype).expand_as(condition)
        level = GUIDANCE[number % len(GUIDANCE)]
        velocity = flow.guided(_velocity(dit, condition), _velocity(dit, null), level)
        noise = torch.randn(len(condition), config.channels, side, side, device=device)
        latents = flow.solve(sampler, velocity, noise, times).flatten(2).transpose(1, 2) * std + mean  # [B, L, C]
        pixels = torch.cat([decoder(latents[i : i + 1024]).float() for i in range(0, len(latents), 1024)])
        pictures = to_uint8(pixels, [PIXEL_MEAN] * 3, [PIXEL_STD] * 3)
        yield latents.flatten(1).bfloat16(), pictures.cpu().numpy()


def _velocity(dit: DiT, condition: Tensor) -> flow.Velocity:
    def velocity(x: Tensor, t: float) -> Tensor:
        v: Any = dit(x, torch.full((len(x),), t, device=x.device), condition)
        return v.float()

    return velocity
