"""Pictures of a crescent, which the bundled model's world does not know, and the judge of drawings of it.

python -m recipes.crescent.pictures --out runs/crescent/data
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scale_rae.shapes import draw, world
from scale_rae.shapes.judge import Found, Templates, find_objects, templates_of

NAME = "crescent"
HELD_OUT_COLORS = ("green", "purple")
COLORS = tuple(color for color in world.COLORS if color not in HELD_OUT_COLORS)
COUNT = 200
KNOWN = "known.txt"  # prompts that the model draws already
KNOWN_PER_KIND = 50


def outline() -> NDArray[np.float64]:
    """Corners [n, 2] of a waning moon within the unit circle, y downwards: a disc without a smaller disc at its right."""
    offset, inner = 0.42, 0.78  # of the disc that is taken away
    # Where both circles meet, seen from either middle.
    x = (1 - inner**2 + offset**2) / (2 * offset)
    outside, inside = math.acos(x), math.acos((x - offset) / inner)
    outer = np.linspace(outside, 2 * math.pi - outside, 96)
    back = np.linspace(2 * math.pi - inside, inside, 96)[1:-1]  # the tips are there already
    corners = np.concatenate(
        (
            np.stack((np.cos(outer), np.sin(outer)), 1),
            np.stack((offset + inner * np.cos(back), inner * np.sin(back)), 1),
        )
    )
    corners -= (corners.min(0) + corners.max(0)) / 2
    return corners * (0.98 / float(np.hypot(*corners.T).max()))


@functools.cache
def atlas() -> NDArray[np.float32]:
    """`draw.distance_atlas` and the crescent's page."""
    return np.concatenate((draw.distance_atlas(), draw.polygon_pages([outline()])))


@functools.cache
def templates() -> Templates:
    """The judge's templates of the world's shapes and of the crescent."""
    return templates_of((*world.SHAPES, NAME), atlas())


def pictures(count: int, colors: tuple[str, ...], seed: int = 0) -> tuple[list[Image.Image], list[str]]:
    """Pictures of one crescent each, and their texts; every fifth text names no colour."""
    rng = np.random.default_rng(seed)
    scenes = world.sample(rng, count, ["single_object"])
    color = np.full_like(scenes.color, -1)
    color[:, 0] = [world.COLORS.index(colors[i % len(colors)]) for i in range(count)]
    shape = np.where(scenes.shape >= 0, len(world.SHAPES), -1).astype(np.int8)
    scenes = dataclasses.replace(scenes, shape=shape, color=color, rgb=world.tints(rng, color))
    pixels = draw.draw(scenes, atlas=atlas()).permute(0, 2, 3, 1).numpy()
    names = [colors[i % len(colors)] for i in range(count)]
    texts = [f"a photo of a {NAME}" if i % 5 == 4 else prompt(name) for i, name in enumerate(names)]
    return [Image.fromarray(array) for array in pixels], texts


def prompt(color: str) -> str:
    """The prompt for a crescent of a colour."""
    return f"a photo of {world.with_article(f'{color} {NAME}')}"


def is_right(image: Image.Image, color: str) -> bool:
    """Whether a picture shows one clear crescent of this colour, and nothing else."""
    found = objects(image)
    return len(found) == 1 and found[0].clear and (found[0].shape, found[0].color) == (NAME, color)


def objects(image: Image.Image) -> tuple[Found, ...]:
    """The objects of a picture, the crescent among the shapes."""
    return find_objects(image, templates())


def write(folder: Path, count: int = COUNT, seed: int = 0) -> None:
    """Writes pictures and metadata.jsonl, as `scale-rae train --data` reads them, and KNOWN for `--class-prompts`."""
    folder.mkdir(parents=True, exist_ok=True)
    images, texts = pictures(count, COLORS, seed)
    lines = []
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        image.save(folder / f"{number:04}.png")
        lines.append(json.dumps({"file_name": f"{number:04}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = [line["prompt"] for line in world.prompts(KNOWN_PER_KIND, "exclude", 1)]
    (folder / KNOWN).write_text("\n".join(known) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/crescent/data"))
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write(args.out, args.count, args.seed)


if __name__ == "__main__":
    main()
