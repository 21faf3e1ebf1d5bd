"""Files of pictures with metadata made by hand, broken in the ways that cameras, editors and disks break it."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.png import chunk, with_chunk

ASCII, SHORT, LONG, RATIONAL, SIGNED_RATIONAL = 2, 3, 4, 5, 10
TURNED = (0x0112, SHORT, 1, 6)  # the camera was turned: the stored top is the picture's right


def picture(width: int = 40, height: int = 24) -> Image.Image:
    """A picture that looks different from each side, and survives a JPEG."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))


def exif(*entries: tuple[int, int, int, int], order: str = "<", after: bytes = bytes(64), claimed: int = 0) -> bytes:
    """EXIF data of (tag, type, count, value or offset), which claims to have more entries if asked to."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    parts = [head, struct.pack(order + "H", claimed or len(entries))]
    for tag, kind, count, value in entries:
        short = kind == SHORT and count == 1
        parts.append(struct.pack(order + ("HHIHxx" if short else "HHII"), tag, kind, count, value))
    return b"".join(parts) + after


# EXIF data whose orientation is good and of which something else is broken.
BROKEN: dict[str, bytes] = {
    "good": exif(TURNED),
    "big-endian": exif(TURNED, order=">"),
    "a rational over zero": exif(TURNED, (0x011A, SIGNED_RATIONAL, 1, 38), after=bytes(4) + b"\xff" * 4 + bytes(8)),
    "text for a number": exif((0x0100, ASCII, 4, 0x636261), TURNED, (0x0213, ASCII, 4, 0x7A7978)),
    "a number for text": exif((0x010F, SHORT, 1, 7), TURNED, (0x0131, SHORT, 2, 0x90007), (0x013B, RATIONAL, 1, 40)),
    "an unknown type": exif((0x010F, 99, 1, 7), TURNED),
    "a count of billions": exif((0x010F, ASCII, 0xFFFFFFFF, 8), TURNED),
    "an offset past the end": exif((0x010F, ASCII, 100, 0xFFFFFF00), TURNED, (0x011A, RATIONAL, 1, 0xFFFFFFF0)),
    "a directory within itself": exif(TURNED, (0x8769, LONG, 1, 8), (0x8825, LONG, 1, 8)),
    "a directory at text": exif(TURNED, (0x8769, ASCII, 4, 0x636261), (0x8825, ASCII, 4, 0x636261)),
    "a next directory in a loop": exif(TURNED, after=struct.pack("<I", 8)),
    "entries that are missing": exif(TURNED, after=b"", claimed=60_000),
    "a resolution that is no number": exif(TURNED, (0x011A, ASCII, 2, 0x61), (0x0128, ASCII, 2, 0x61)),
}
# EXIF data that nothing can be read from.
NONSENSE: dict[str, bytes] = {
    "empty": b"",
    "no header": b"\0\x08\0\x02\x01\x12\0\x03",
    "header only": b"II*\0",
    "past the end": b"II*\0\xff\xff\xff\x7f",
    "cut in the entry": exif(TURNED, after=b"")[:14],
    "random": bytes(range(3, 255, 7)),
}


def save(kind: str, **options: Any) -> bytes:
    """The picture in a file of Pillow's format `kind`."""
    buffer = io.BytesIO()
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    picture().save(buffer, kind, **(lossless | options))
    return buffer.getvalue()


def segment(code: int, data: bytes) -> bytes:
    """A JPEG's segment."""
    return bytes([0xFF, code]) + struct.pack(">H", len(data) + 2) + data


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP of these chunks."""
    body = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) & 1) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def with_exif(kind: str, data: bytes) -> bytes:
    """The picture in a file of that kind with this EXIF data."""
    if kind == "JPEG":
        plain = save("JPEG")
        return plain[:2] + segment(0xE1, b"Exif\0\0" + data) + plain[2:]
    if kind == "PNG":
        return with_chunk(save("PNG"), chunk(b"eXIf", data))
    if kind == "PNG after the pixels":
        return with_chunk(save("PNG"), chunk(b"eXIf", data), before=b"IEND")
    if kind == "PNG as ImageMagick":
        digits = data.hex()
        profile = f"\nexif\n{len(data):8}\n" + "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
        return with_chunk(save("PNG"), chunk(b"tEXt", b"Raw profile type exif\0" + profile.encode()))
    assert kind == "WEBP"
    plain = save("WEBP")
    size = b"".join((n - 1).to_bytes(3, "little") for n in picture().size)
    return riff((b"VP8X", b"\x08\0\0\0" + size), (plain[12:16], plain[20:]), (b"EXIF", data))
