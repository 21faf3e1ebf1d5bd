"""The judge of the world of shapes: lists a picture's objects from its pixels, and compares them with a prompt.

Classical vision, no network. The background is one plane per channel, fitted to the pixels at the frame. Objects are the connected
regions that differ from it. A region's colour is the nearest of the palette in CIELAB; its shape is the template of highest overlap.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab

from scale_rae.shapes.draw import ATLAS_SIZE, REACH, distance_atlas
from scale_rae.shapes.world import COLORS, PALETTE, SHAPES, SIZE, mismatches

MIN_SIDE = 64
CONTRAST = 0.18  # RGB distance (0..1 a channel) from the background at which an object begins
MIN_AREA = 25.0  # px; the world's smallest object has some 200
CLEAR_OVERLAP = 0.83  # intersection over union below which a shape is not recognised
CLEAR_LEAD = 0.03  # and by how much it must be ahead of the next shape
CLEAR_COLOR = 25.0  # CIELAB distance above which a colour is none of the palette's
SECOND_COLOR = 0.15  # share of a region's inside that makes another colour another object

GRID = 40  # regions and templates are compared on GRID x GRID points,
GRID_REACH = 1.2  # which reach this far from the centroid, in units of the square root of the area
TILTS = np.radians(np.arange(-18, 19, 3))

Float = NDArray[np.float32]
Picture = Image.Image | NDArray[np.uint8] | str | os.PathLike[str]


@dataclass(frozen=True)
class Found:
    """An object found in a picture."""

    shape: str
    color: str
    x: float
    """Centroid, px of a 128 x 128 picture."""
    y: float
    area: float
    """px of a 128 x 128 picture."""
    confidence: float
    """Intersection over union with the best template of `shape`, 0..1."""
    clear: bool
    """Whether shape and colour are recognised with certainty; if not they are guesses."""


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what was asked for."""

    correct: bool
    reason: str
    """Empty if correct, else what is wrong, in GenEval's manner."""
    objects: tuple[Found, ...]


def judge(image: Picture, metadata: dict[str, Any]) -> Verdict:
    """Whether the picture shows exactly what GenEval's `metadata` asks for, and nothing else or unclear.

    Number, colour and place of all objects count. Arguments and errors are those of `find_objects`."""
    return compare(find_objects(image), metadata)


def compare(objects: tuple[Found, ...], metadata: dict[str, Any]) -> Verdict:
    """Whether a picture with these objects shows exactly what GenEval's `metadata` asks for, and nothing else or unclear."""
    reasons = [
        f"unclear {thing.color} object at {thing.x:.0f}, {thing.y:.0f}, most like a {thing.shape}"
        for thing in objects
        if not thing.clear
    ]
    reasons += mismatches(metadata, objects)
    return Verdict(not reasons, "; ".join(reasons), objects)


class Templates(NamedTuple):
    """Outlines that regions are compared with: `names` of shapes, each at every tilt, 0 or 1, [shapes * tilts, GRID * GRID]."""

    names: tuple[str, ...]
    outlines: Float


def find_objects(image: Picture, templates: Templates | None = None) -> tuple[Found, ...]:
    """The objects of a square picture, left to right; their shapes are the world's, or those of `templates`.

    image: PIL image, path of one, or uint8 array [H, H, 3]; at least 64 px a side, any other size than 128 is resized.
    Raises ValueError if it is not square, too small, or an array of another form.
    """
    return tuple(thing for thing, _ in find_regions(image, templates))


def find_regions(image: Picture, templates: Templates | None = None) -> list[tuple[Found, NDArray[np.bool_]]]:
    """The objects of a square picture, left to right, each with its pixels in a picture of 128 x 128 px, bool [128, 128].

    Arguments and errors are those of `find_objects`.
    """
    templates = templates or _world_templates()
    pixels = _pixels(image)
    back = _background(pixels)
    regions = _regions(pixels, back, _length(pixels - back) > CONTRAST)
    found = [
        (thing, regions == number)
        for number, window in enumerate(ndimage.find_objects(regions), start=1)
        if (thing := _recognise(number, window, regions, pixels, back, templates))
    ]
    return sorted(found, key=lambda pair: pair[0].x)


def _pixels(image: Picture) -> Float:
    """RGB [128, 128, 3] in 0..1."""
    if isinstance(image, str | os.PathLike):
        with Image.open(image) as file:
            image = file.convert("RGB")
    if not isinstance(image, Image.Image):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected a uint8 array [H, H, 3], got {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    if image.width != image.height or image.width < MIN_SIDE:
        raise ValueError(f"expected a square picture of at least {MIN_SIDE} px, got {image.width} x {image.height}")
    if image.width != SIZE:
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)


@functools.cache
def _plane_terms() -> tuple[Float, NDArray[np.bool_]]:
    """1, x and y of each pixel, [128 * 128, 3], and which pixels [128 * 128] belong to the frame."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32).reshape(2, -1) / SIZE - 0.5
    return np.stack((np.ones_like(x), x, y), 1), np.maximum(abs(x), abs(y)) > 0.5 - 4 / SIZE


def _background(pixels: Float) -> Float:
    """The background behind the objects, [128, 128, 3]: a plane per channel, fitted to the frame, then to all similar pixels."""
    terms, frame = _plane_terms()
    flat = pixels.reshape(-1, 3)
    near = _length(flat - np.median(flat[frame], axis=0).astype(np.float32)) < 0.20
    plane = np.zeros_like(flat)
    everywhere = np.ones_like(frame)
    for used, tolerance in ((frame, 0.08), (frame, 0.07), (everywhere, 0.06), (everywhere, 0.06)):
        chosen = terms[used & near]
        plane = terms @ np.linalg.lstsq(chosen.T @ chosen, chosen.T @ flat[used & near], rcond=None)[0]
        near = _length(flat - plane) < tolerance
    return plane.reshape(pixels.shape)


def _length(colors: Float) -> Float:
    """Euclidean length over the last axis (numpy's norm is ten times slower over three channels)."""
    return np.sqrt(np.einsum("...c,...c->...", colors, colors))


def _regions(pixels: Float, back: Float, mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The connected parts of the mask, numbered 1, 2, … ([128, 128], 0 outside); parts of two colours are divided."""
    labels, count = ndimage.label(mask)
    inside = ndimage.binary_erosion(mask, iterations=2)  # edges mix colours
    colors = np.full(mask.shape, -1)
    colors[inside] = np.linalg.norm(pixels[inside][:, None] - PALETTE, axis=2).argmin(1)
    for number in range(1, count + 1):
        own = labels == number
        least = max(SECOND_COLOR * (own & inside).sum(), MIN_AREA)
        shares = np.bincount(colors[own & inside], minlength=len(COLORS))
        if (shares > least).sum() < 2:
            continue
        # A blurred edge may look like another of the palette's colours; it lies on the way to the background.
        main = colors == shares.argmax()
        _, off = _cover(pixels, back, np.median(pixels[own & main], axis=0))
        seeds = own & inside & (main | (off > CONTRAST))
        several = np.flatnonzero(np.bincount(colors[seeds], minlength=len(COLORS)) > least)
        if len(several) < 2:
            continue
        seeds &= np.isin(colors, several)
        nearest = ndimage.distance_transform_edt(~seeds, return_distances=False, return_indices=True)
        for color in several:
            parts, parts_count = ndimage.label(own & (colors[tuple(nearest)] == color))
            labels[parts > 0] = parts[parts > 0] + count
            count += parts_count
    return labels


def _cover(pixels: Float, back: Float, color: Float) -> tuple[Float, Float]:
    """How much of each pixel an object of that colour covers, 0..1, and how far (RGB) the pixel is off any such mixture; [H, W]."""
    way = color - back
    cover = np.einsum("hwc,hwc->hw", pixels - back, way) / np.maximum(np.einsum("hwc,hwc->hw", way, way), 1e-6)
    cover = cover.clip(0, 1)
    return cover, _length(pixels - back - cover[:, :, None] * way)


def _recognise(
    number: int,
    window: tuple[slice, slice] | None,
    regions: NDArray[np.int32],
    pixels: Float,
    back: Float,
    templates: Templates,
) -> Found | None:
    """Colour and shape of one region, None if it is too small to be anything."""
    if window is None:  # a region that was divided
        return None
    rows, columns = (slice(max(0, side.start - 3), side.stop + 3) for side in window)
    labels, pixels, back = regions[rows, columns], pixels[rows, columns], back[rows, columns]
    own = labels == number
    if own.sum() < MIN_AREA:
        return None
    depth = ndimage.distance_transform_edt(np.pad(own, 1))[1:-1, 1:-1]
    color = np.median(pixels[depth >= min(3.0, depth.max())], axis=0)
    from_palette = np.linalg.norm(rgb2lab(color) - _palette_lab(), axis=1)
    cover, _ = _cover(pixels, back, color)
    cover[~ndimage.binary_dilation(own, iterations=2) | ((labels != 0) & ~own)] = 0
    area = float(cover.sum())
    if area < MIN_AREA:
        return None
    y, x = (float((cover.sum(1 - axis) * np.arange(cover.shape[axis])).sum()) / area for axis in (0, 1))
    points = np.linspace(-GRID_REACH, GRID_REACH, GRID) * math.sqrt(area)
    at = np.stack(np.meshgrid(y + points, x + points, indexing="ij"))
    sampled = (ndimage.map_coordinates(cover, at, order=1) > 0.5).astype(np.float32).ravel()
    names, outlines = templates
    common = outlines @ sampled
    overlap = (common / (outlines.sum(1) + sampled.sum() - common)).reshape(len(names), -1).max(1)
    second, best = np.argsort(overlap)[-2:]
    return Found(
        shape=names[best],
        color=COLORS[from_palette.argmin()],
        x=columns.start + x + 0.5,
        y=rows.start + y + 0.5,
        area=area,
        confidence=float(overlap[best]),
        clear=bool(
            overlap[best] >= CLEAR_OVERLAP
            and overlap[best] - overlap[second] >= CLEAR_LEAD
            and from_palette.min() <= CLEAR_COLOR
        ),
    )


@functools.cache
def _palette_lab() -> NDArray[np.float64]:
    """The palette in CIELAB, [8, 3]."""
    return rgb2lab(PALETTE)


@functools.cache
def _world_templates() -> Templates:
    return templates_of(SHAPES, distance_atlas())


def templates_of(names: Sequence[str], pages: Float) -> Templates:
    """Every shape of an atlas (`draw.distance_atlas`) at every tilt, centred on its centroid and scaled to area 1."""
    unit = 2 * REACH / (ATLAS_SIZE - 1)  # one step of the atlas, in radii
    axis = np.linspace(-GRID_REACH, GRID_REACH, GRID)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    templates = []
    for page in pages:
        inside = page < 0
        scale = math.sqrt(inside.sum()) * unit
        middle = np.array(ndimage.center_of_mass(inside))
        for tilt in TILTS:
            turned = np.stack((y * np.cos(tilt) - x * np.sin(tilt), x * np.cos(tilt) + y * np.sin(tilt)))
            at = turned * (scale / unit) + middle[:, None, None]
            templates.append((ndimage.map_coordinates(page, at, order=1, mode="nearest") < 0).ravel())
    return Templates(tuple(names), np.array(templates, dtype=np.float32))
