"""Invented shapes and colours, which only training shows.

Training shows 25 of the world's 28 pairs of shapes, and 58 of its 64 coloured shapes. A network that sees no more combinations learns
which shapes and colours occur together, and that the held-out ones do not. Among all combinations of 24 shapes and 20 colours, only
one in a hundred is held out, so the network learns what each name means by itself.

The invented names are words from small talk, so the tokenizer needs no further words. Some names have no picture: they occur in texts
only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np
from numpy.typing import NDArray

from scale_rae.shapes import world
from scale_rae.shapes.world import Scene, SceneBatch

SHARE = 0.5  # of the scenes that may hold something invented
EACH = 0.5  # of the shapes, and of the colours, of such a scene

Corners = NDArray[np.float64]


def _other_words() -> list[str]:
    """Words of small talk that are said neither in prompts nor in requests or questions, sorted."""
    said = (*world.SHAPES, *map(world.plural, world.SHAPES), *world.COLORS, *world.NUMBERS, *world.RELATIONS)
    said += (*world.REQUEST_WORDINGS, *world.HELD_OUT_WORDINGS, world.DESCRIBE, world.ALIGN, world.REPLY)
    said += ("a", "an", "I", "and", "is", "there", "What", "color", "object", "objects")

    def words(texts: tuple[str, ...]) -> set[str]:
        return set(re.findall(r"[A-Za-z]+", " ".join(texts)))

    return sorted(words((*world.CHATS, world.CHAT_REPLY)) - words(said))


NAMES = _other_words()
SHAPE_NAMES, COLOR_NAMES = (*world.SHAPES, *NAMES[::2]), (*world.COLORS, *NAMES[1::2])
"""The world's words, then made-up names of shapes and colours: words that mean something else elsewhere ("a sky poem")."""

HUES: NDArray[np.float32] = np.array(
    [
        [0.45, 0.26, 0.10],
        [0.50, 0.50, 0.50],
        [0.10, 0.80, 0.85],
        [0.05, 0.10, 0.42],
        [0.47, 0.46, 0.05],
        [0.45, 0.03, 0.12],
        [0.60, 0.95, 0.10],
        [0.90, 0.10, 0.75],
        [0.78, 0.63, 0.42],
        [0.00, 0.45, 0.46],
        [0.64, 0.58, 0.95],
        [0.02, 0.28, 0.10],
    ],
    dtype=np.float32,
)
"""RGB of the first made-up colours: brown, grey, cyan, navy, olive, maroon, lime, magenta, tan, teal, lavender, dark green."""


@functools.cache
def _outlines() -> list[Corners]:
    """Corners [n, 2] of the first made-up shapes, within the unit circle, y downwards."""

    def block(*rows: str) -> Corners:
        """The outline of a one-piece figure of squares, without holes."""
        cells = {(x, y) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell == "#"}
        edges: dict[tuple[int, int], tuple[int, int]] = {}
        for x, y in cells:
            for step, start, end in (
                ((0, -1), (x, y), (x + 1, y)),
                ((1, 0), (x + 1, y), (x + 1, y + 1)),
                ((0, 1), (x + 1, y + 1), (x, y + 1)),
                ((-1, 0), (x, y + 1), (x, y)),
            ):
                if (x + step[0], y + step[1]) not in cells:
                    edges[start] = end
        path = [min(edges)]
        while (after := edges[path[-1]]) != path[0]:
            path.append(after)
        return fitted(np.array(path, dtype=np.float64))

    def fitted(corners: Corners) -> Corners:
        corners = corners - (corners.min(0) + corners.max(0)) / 2
        return corners * (0.98 / float(np.hypot(*corners.T).max()))

    def points(*corners: tuple[float, float]) -> Corners:
        return fitted(np.array(corners, dtype=np.float64))

    def turning(reach: Corners, angle: Corners) -> Corners:
        return fitted(reach[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1))

    round_ = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    half = np.linspace(0, math.pi, 48)
    spikes = np.arange(8) * math.pi / 4
    outer = np.stack((np.cos(half), -np.sin(half)), 1)
    inner = np.stack((0.9 * np.cos(half[::-1]), -0.45 * np.sin(half[::-1])), 1)
    return [
        points((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)),  # bar
        block("#..", "#..", "###"),  # L
        block("###", ".#.", ".#."),  # T
        block("#.#", "#.#", "###"),  # U
        block("##.", ".#.", ".##"),  # Z
        block("#.#", "###", "#.#"),  # H
        points((0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)),  # arrow
        fitted(np.concatenate((outer, inner))),  # crescent
        fitted(outer),  # half a disc
        points((-0.8, -1), (0.8, -1), (0.12, 0), (0.8, 1), (-0.8, 1), (-0.12, 0)),  # hourglass
        turning(np.where(np.arange(8) % 2 == 0, 1.0, 0.3), spikes),  # four thin spikes
        points((-0.35, -0.55), (1, -0.55), (0.35, 0.55), (-1, 0.55)),  # slanted
        turning(0.62 + 0.38 * np.cos(3 * round_), round_),  # three leaves
        points((-1, -0.75), (-0.45, -0.75), (0, 0), (0.45, -0.75), (1, -0.75), (0.25, 0.75), (-0.25, 0.75)),  # V
        points((-0.75, 1), (-0.75, -0.05), (0, -1), (0.75, -0.05), (0.75, 1), (0, 0.45)),  # a torn flag
        points((-1, -0.35), (0, -0.35), (0, -0.7), (1, 0), (0, 0.7), (0, 0.35), (-1, 0.35)),  # fat arrow to the right
    ]


@functools.cache
def atlas() -> NDArray[np.float32]:
    """`draw.distance_atlas`, then a page for each made-up shape that has a form."""
    from scale_rae.shapes import draw  # imports torch, which the names alone do not need

    return np.concatenate((draw.distance_atlas(), draw.polygon_pages(_outlines())))


def forms() -> int:
    """How many of `SHAPE_NAMES` have a form."""
    return len(world.SHAPES) + len(_outlines())


def hues() -> int:
    """How many of `COLOR_NAMES` have a hue."""
    return len(world.COLORS) + len(HUES)


def put_in(
    rng: np.random.Generator, scenes: SceneBatch, share: float = SHARE, each: float = EACH, counted: bool = False
) -> tuple[SceneBatch, NDArray[np.bool_]]:
    """The scenes with invented shapes and colours in the place of some, and which [N] have any.

    A scene may hold them with probability `share`; then `each` of its shapes, and of its colours, is one with that probability.
    Counting scenes keep theirs, since made-up names have no plural; if they may be `counted`, with an s, all objects of such a scene get
    one invented shape. Invented shapes of other scenes differ from each other. A scene whose remaining shapes would have a held-out
    number keeps its shapes.
    """
    n = len(scenes)
    counting = scenes.kind == world.SCENE_KINDS.index("counting")
    chosen = (rng.random(n) < share) & (counted | ~counting)
    there = scenes.shape >= 0
    new_shape = chosen[:, None] & there & (rng.random(there.shape) < each)
    new_color = chosen[:, None] & there & (rng.random(there.shape) < each)
    real, more = len(world.SHAPES), forms() - len(world.SHAPES)
    order = rng.random((n, more)).argsort(1)[:, : there.shape[1]] + real  # different within a scene
    new_shape[counting] = (chosen & counting)[counting, None] & there[counting]
    order[counting] = order[counting, :1]
    left = np.where(new_shape, order, scenes.shape)
    for count, shape in world.HELD_OUT_COUNTS:
        new_shape[(left == world.SHAPES.index(shape)).sum(1) == count] = False
    color = rng.integers(len(world.COLORS), hues(), there.shape)
    attr = scenes.kind == world.SCENE_KINDS.index("color_attr")
    same = attr & new_color.all(1, where=there) & (color[:, 0] == color[:, 1])  # this kind names two colours
    new_color[same, 1] = False
    rgb = world.tints(rng, color, np.concatenate((world.PALETTE, HUES)))
    changed = dataclasses.replace(
        scenes,
        shape=np.where(new_shape, order, scenes.shape).astype(np.int8),
        color=np.where(new_color, color, scenes.color).astype(np.int8),
        rgb=np.where(new_color[:, :, None], rgb, scenes.rgb),
    )
    return changed, (new_shape | new_color).any(1)


def named(scenes: SceneBatch) -> list[Scene]:
    """The scenes with their names, made-up ones too."""
    return list(scenes.named(SHAPE_NAMES, COLOR_NAMES))
