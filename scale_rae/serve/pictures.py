"""Pictures in requests: data URLs, and nothing that would have to be fetched."""

from __future__ import annotations

import base64
import binascii
import io
import re

from PIL import Image

from scale_rae.errors import InputError
from scale_rae.images import read_image
from scale_rae.serve.settings import IMAGE_FORMATS

_HEAD = re.compile(r"data:image/(png|jpeg|jpg|webp|gif);base64,", re.IGNORECASE)
_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*:")


def read_data_url(url: str, name: str, max_pixels: int) -> Image.Image:
    """The picture in a data URL, 8-bit RGB; `name` is the request's field.

    Raises:
        InputError: for an address of any other kind, and for what is no picture, damaged, or too large.
    """
    head = _HEAD.match(url)
    if head is None:
        scheme = _SCHEME.match(url)
        is_address = scheme is not None and not scheme.group().strip().lower().startswith("data:")
        said = "addresses are not fetched; send the image itself" if is_address else "not an image's data URL"
        raise InputError(f"{name}: {said}, as data:image/png;base64,… (or jpeg, webp, gif)")
    try:
        data = base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputError(f"{name}: the data URL's base64 is damaged") from e
    try:
        return read_image(io.BytesIO(data), name, max_pixels, IMAGE_FORMATS)
    except InputError as e:
        if isinstance(e.__cause__, OSError | ValueError | SyntaxError | EOFError) and "damaged" in str(e):
            raise InputError(f"{name}: the image is damaged or cannot be read") from e  # not what Pillow says of it
        raise
