"""The colour classifier's view of an object: its box, cut out along its mask.

Pixels outside the mask become grey; parts of the box outside the picture are black. As in the original evaluator, to the bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageColor

from scale_rae.errors import InputError

BACKGROUND = "#999"
ORIGINAL = "original"


def crop(
    image: Image.Image,
    box: ArrayLike,
    mask: NDArray[np.bool_] | None,
    background: str = BACKGROUND,
    cropped: bool = True,
) -> Image.Image:
    """The object in `box`, RGB; pixels outside its `mask` have the colour `background`.

    `box` begins with x0, y0, x1, y1 in pixels, which are rounded half to even. `mask` is [H, W], as large as the picture; None
    keeps every pixel, and so does the background "original". Without `cropped`, the whole picture is kept. The picture's alpha
    is dropped, not blended.

    Raises:
        InputError: the mask has another size than the picture, the box ends before it begins, or the colour is unknown.
    """
    sides = np.asarray(box)[:4] if cropped else (0, 0, image.width, image.height)
    x0, y0, x1, y1 = (round(float(side)) for side in sides)  # half to even
    if x1 < x0 or y1 < y0:
        raise InputError(f"box {[x0, y0, x1, y1]}: ends before it begins")
    part = image.convert("RGB").crop((x0, y0, x1, y1))
    if mask is None or background == ORIGINAL:
        return part
    if mask.shape != (image.height, image.width):
        raise InputError(f"a mask {list(mask.shape)} of a picture [{image.height}, {image.width}]")
    try:
        color = ImageColor.getrgb(background)[:3]
    except ValueError as e:
        raise InputError(f"background {background!r}: must be a colour like {BACKGROUND}, or {ORIGINAL}") from e
    outside = Image.fromarray(np.where(mask, np.uint8(0), np.uint8(255)))
    inside_box = outside.crop((x0, y0, x1, y1))  # 0 beyond the picture, where the crop stays black
    part.paste(color, mask=inside_box)
    return part
