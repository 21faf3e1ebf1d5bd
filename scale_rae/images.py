"""Reads image files and Pillow images as 8-bit RGB, upright and on white."""

from __future__ import annotations

import importlib
import io
import logging
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from scale_rae import containers
from scale_rae.errors import InputError, first_line, printable
from scale_rae.files import read_bytes

# The formats that are read, with Pillow's modules that decode them. Pillow reads forty more; some start other programs
# (EPS: Ghostscript), some decode before the size is known (ICO), and none is what people keep pictures in.
FORMATS = {
    "PNG": "PngImagePlugin",
    "JPEG": "JpegImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "PPM": "PpmImagePlugin",
    "AVIF": "AvifImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
}
MAX_PIXELS = 100_000_000  # 300 MB as RGB; encoders see a few hundred pixels per side
MAX_BYTES = 512 << 20  # of a file; MAX_PIXELS of uncompressed RGBA are 381 MiB

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SAMPLE_FORMAT, _UNSIGNED = 339, 1  # a TIFF's tag, and its value for integers that are never negative

logging.getLogger("PIL").addHandler(logging.NullHandler())  # keeps its messages on damaged files from stderr


def load_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, upright by its EXIF orientation, flattened onto white.

    Raises:
        InputError: naming the file, when it is missing, not an image of FORMATS, damaged, or over MAX_PIXELS.
    """
    return decode_image(read_image(path), str(path))


def read_image(path: str | Path) -> bytes:
    """The bytes of an image file or a pipe, read once, at most MAX_BYTES.

    Raises:
        InputError: naming the file, when it cannot be read.
    """
    return read_bytes(Path(path), MAX_BYTES, "image", pipes=True)


def decode_image(
    data: bytes,
    name: str,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = tuple(FORMATS),
    on_white: bool = True,
) -> Image.Image:
    """The image in a file's bytes, as `load_image` gives it; the first frame of an animation.

    Decoders see neither metadata nor further frames (see containers), and nothing is decoded before its size is known. Without
    `on_white`, transparency is dropped: every pixel has the colour that is stored.

    Raises:
        InputError: beginning with `name`, when it is not an image of `formats`, damaged, or over `max_pixels`.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's warnings about files that it can read
            return _decode(data, max_pixels, formats, on_white)
    except InputError as e:
        raise InputError(f"{name}: {e}") from e.__cause__
    except UnidentifiedImageError as e:
        raise InputError(f"{name}: the image is damaged or cannot be read (no decoder takes it)") from e
    except MemoryError as e:
        raise InputError(f"{name}: there is not enough memory to decode the image; shrink it first") from e
    except Exception as e:  # decoders raise OSError, SyntaxError, struct.error, TypeError, RuntimeError and more
        reason = printable(first_line(e))
        raise InputError(f"{name}: the image is damaged or cannot be read ({reason})") from e


def _decode(data: bytes, max_pixels: int, formats: tuple[str, ...], on_white: bool) -> Image.Image:
    kind = _format(data, formats)
    if kind is None:
        what = "the file is empty" if not data else f"formats that are read: {', '.join(formats)}"
        raise InputError(f"not an image ({what})")
    bare = containers.bare(data, kind)
    _check_size(bare.size or (0, 0), max_pixels)
    try:
        opened = Image.open(io.BytesIO(bare.data), formats=(kind,))
    except Image.DecompressionBombError as e:
        raise _too_large(f"over {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels", max_pixels) from e
    with opened as image:
        _check_size(image.size, max_pixels)
        image.load()
        turn = bare.orientation
        if kind == "AVIF":
            turn = containers.orientation(image.info.get("exif", b""), image.info.get("xmp", b""))
        eight_bits: Image.Image = image
        if image.mode == "I":
            eight_bits = _eight_bits(_integers(image))
        elif image.mode.startswith("I;16"):  # which Pillow's own conversion would clip
            eight_bits = _eight_bits(np.asarray(image))
        picture = to_rgb(eight_bits) if on_white else eight_bits.convert("RGB")
    return picture.transpose(_TURNS[turn]) if turn in _TURNS else picture


def _format(data: bytes, formats: tuple[str, ...]) -> str | None:
    """Which of Pillow's `formats` a file is in, by its first bytes."""
    start = data[:16].ljust(16, b"\0")
    for kind in formats:
        try:
            importlib.import_module(f"PIL.{FORMATS[kind]}")
        except ImportError:  # AVIF, before Pillow 11.3
            continue
        accept = Image.OPEN[kind][1]
        if accept is not None and (taken := accept(start)):
            if isinstance(taken, str):  # why this Pillow cannot
                raise InputError(f"this installation of Pillow cannot read {kind} images; save it as PNG or JPEG")
            return kind
    return None


def _integers(image: Image.Image) -> np.ndarray:
    """The values of an image in Pillow's mode I, as 16 bits where the format has no more."""
    values = np.asarray(image)
    if image.format != "TIFF":
        return values.clip(0, 65535).astype(np.uint16)
    unsigned = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED
    return values.view(np.uint32) if unsigned else values


Picture = Image.Image | str | os.PathLike[str]
"""A picture as the Python API takes it: an image of Pillow's, or the path of a file."""


def as_rgb(picture: Picture) -> Image.Image:
    """8-bit RGB of a picture: `to_rgb` of an image, `load_image` of a path.

    Raises:
        InputError: for anything else, and as those two functions do.
    """
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    if isinstance(picture, str | os.PathLike):
        return load_image(Path(picture))
    raise InputError(f"a picture must be a PIL image or a path, not {type(picture).__name__}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, flattened onto white; integers are scaled, not clipped.

    Values of 16 bits are divided by 257. Integers of 32 bits hardly ever fill their range: their depth is taken to be 8
    bits if all values are below 256, 16 if all are below 65536, and otherwise what the largest needs. Negative ones are
    black.

    Raises:
        InputError: for floating-point values.
    """
    if image.mode.startswith("I"):
        image = _eight_bits(np.asarray(image))
    elif image.mode == "F":
        raise InputError("floating-point images have no defined range; save it as 8- or 16-bit first")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> Image.Image:
    """Integers as a grey image; `to_rgb` says how they are scaled."""
    depth = 16 if values.dtype.itemsize == 2 else int(values.max()).bit_length()
    values = values.clip(0)
    if depth > 16:
        values = values >> (depth - 8)
    elif depth > 8:
        values = values // 257
    return Image.fromarray(values.astype(np.uint8))


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise _too_large(f"{size[0]} x {size[1]} pixels", max_pixels)


def _too_large(size: str, max_pixels: int) -> InputError:
    return InputError(f"the image is too large ({size}; at most {max_pixels:,} in all); shrink it first")
