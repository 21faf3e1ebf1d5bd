"""Image files as people have them -> 8-bit RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours, and stricter
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(_too_large(path, f"{image.width} x {image.height}"))
                return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as e:
        raise InputError(_too_large(path, "over twice Pillow's own limit")) from e
    except FileNotFoundError as e:
        raise InputError(f"{path}: no such image") from e
    except UnidentifiedImageError as e:
        raise InputError(f"{path}: not an image that Pillow can read") from e
    except IsADirectoryError as e:
        raise InputError(f"{path}: is a folder, not an image") from e
    except (OSError, ValueError, SyntaxError, EOFError) as e:
        raise InputError(f"{path}: the image is damaged or cannot be read ({e})") from e


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


def _too_large(path: Path, size: str) -> str:
    return f"{path}: the image is too large ({size} pixels; at most {MAX_PIXELS:,} in all); shrink it first"
