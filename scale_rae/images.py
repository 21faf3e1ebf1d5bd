"""Image files as people have them -> 8-bit RGB."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from scale_rae.errors import InputError

MAX_PIXELS = 100_000_000  # 300 MB as RGB; anything an encoder sees is shrunk to a few hundred pixels a side


def load_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, turned upright by its EXIF orientation, transparency laid on white.

    Raises:
        InputError: naming the file, when it is missing, not an image, damaged, or over MAX_PIXELS.
    """
    path = Path(path)
    try:
        return read_image(path, str(path))
    except FileNotFoundError as e:
        raise InputError(f"{path}: no such image") from e
    except IsADirectoryError as e:
        raise InputError(f"{path}: is a folder, not an image") from e


def read_image(
    source: Path | BinaryIO, name: str, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """`load_image` of a file or an open stream called `name`, in one of Pillow's `formats` (default: any).

    Nothing is decoded before its size is known.

    Raises:
        InputError: naming it, when it is not an image, damaged, or over `max_pixels`.
        FileNotFoundError, IsADirectoryError: for a path.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours, and stricter
            with Image.open(source, formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise InputError(_too_large(name, f"{image.width} x {image.height} pixels", max_pixels))
                return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as e:
        raise InputError(_too_large(name, f"over {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels", max_pixels)) from e
    except UnidentifiedImageError as e:
        what = f"a {' or '.join(formats)} image" if formats else "an image that Pillow can read"
        raise InputError(f"{name}: not {what}") from e
    except (FileNotFoundError, IsADirectoryError):
        raise  # of opening, which the caller knows how to put
    except (OSError, ValueError, SyntaxError, EOFError) as e:
        raise InputError(f"{name}: the image is damaged or cannot be read ({e})") from e


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB. Transparency is laid on white; 16-bit values are scaled, not clipped."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.int64).clip(0, 65535)
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode == "F":
        raise InputError("floating-point images have no defined range; save it as 8- or 16-bit first")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"{name}: the image is too large ({size}; at most {max_pixels:,} in all); shrink it first"
