"""PNG files made by hand, such as one that is not what it says."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A chunk, with a wrong `checksum` if one is given."""
    sum_ = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", sum_)


def png_of_size(width: int, height: int) -> bytes:
    """A file of a few bytes that says it is as large as that."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_chunk(png: bytes, new: bytes, before: bytes = b"IDAT") -> bytes:
    """A PNG with a chunk put before the first of that name."""
    at = png.index(before) - 4
    return png[:at] + new + png[at:]
