"""Reads images from data URLs in requests. Downloads nothing; imports no torch."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from PIL import Image

from scale_rae.errors import InputError
from scale_rae.images import decode_image
from scale_rae.serve.settings import IMAGE_FORMATS

# RFC 2397: a type, parameters such as `charset=utf-8`, and whether base64 follows
_HEAD = re.compile(r"data:image/(png|jpeg|jpg|webp|gif)(;[^;,]{0,200}){0,20};base64", re.IGNORECASE)
_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*:")


def read_data_url(url: str, name: str, max_pixels: int) -> Image.Image:
    """The image in a data URL, 8-bit RGB; errors name the request's field `name`.

    Raises:
        InputError: for another kind of address, and for data that is no image, damaged, or of more than `max_pixels`.
    """
    head, _, text = url.partition(",")
    if _HEAD.fullmatch(head) is None:
        scheme = _SCHEME.match(head)
        is_address = scheme is not None and not scheme.group().strip().lower().startswith("data:")
        said = "addresses are not fetched; send the image itself" if is_address else "not an image's data URL"
        raise InputError(f"{name}: {said}, as data:image/png;base64,… (or jpeg, webp, gif)")
    try:
        packed = unquote_to_bytes(text) if "%" in text else text.encode("ascii")
        data = base64.b64decode(b"".join(packed.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputError(f"{name}: the data URL's base64 is damaged") from e
    try:
        return decode_image(data, name, max_pixels, IMAGE_FORMATS)
    except InputError as e:
        if e.__cause__ is not None and "damaged" in str(e):
            # Without Pillow's words, which may quote the file.
            raise InputError(f"{name}: the image is damaged or cannot be read") from e
        raise
