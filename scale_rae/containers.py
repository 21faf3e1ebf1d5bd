"""Image file formats (PNG, JPEG, GIF, WebP, TIFF, AVIF): strips metadata, further frames and trailing data; reads orientation.

Pillow parses EXIF tags, colour profiles and text when it opens a file, and fails if one of them is broken; cameras and editors
write broken ones. Attackers write metadata and frames that unpack to gigabytes. So decoders are given only the bytes that the
pixels need, and the orientation, the one useful tag, is read here. A damaged file raises no error here: parts that cannot be
parsed are passed on to the decoder, which reports them.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from scale_rae.errors import InputError

MAX_PARTS = 250_000  # chunks, segments or blocks per file; a PNG of 500 MB in chunks of 8 KiB has 64,000
MAX_SCANS = 100  # per JPEG; each is a pass over all pixels, editors write about ten, libtiff's limit is 100
_MAX_TEXT = 1 << 20  # bytes of text that are unpacked; the orientation is near the start

_ORIENTATION, _XMP = 0x0112, 0x02BC
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q"}  # TIFF's types of whole numbers
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


class Bare(NamedTuple):
    """A file stripped to one picture, and what was read from the parts that were removed."""

    data: bytes
    orientation: int | None = None  # EXIF's values: 1 is upright, 2 to 8 are turned or mirrored
    size: tuple[int, int] | None = None  # (width, height) of formats whose decoders allocate before they report it


def bare(data: bytes, kind: str) -> Bare:
    """The first picture of a file without metadata; its pixels decode to the same values. `kind` is Pillow's format name.

    Raises:
        InputError: the file has more parts or scans than any real image. The message does not name the file.
    """
    strip = _STRIP.get(kind)
    return strip(data) if strip else Bare(data)


def orientation(exif: bytes, xmp: bytes) -> int | None:
    """The orientation from EXIF data, else from XMP, else None. Other tags may be broken."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    directory = _directory(exif)
    if directory is not None and (value := directory.integer(_ORIENTATION)) is not None:
        return value
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else None


def _too_many(what: str, most: int) -> InputError:
    return InputError(f"the image has more than {most:,} {what}; save it again in an image editor")


# PNG: chunks of length, name, data and checksum


def _png(data: bytes) -> Bare:
    view = memoryview(data)
    kept = [view[:8]]
    found: dict[bytes, bytes] = {}  # chunks that may hold the orientation; the last of a kind counts, as in Pillow
    colour = 0
    at = 8
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        body = view[at + 8 : at + 8 + length]
        if name == b"IHDR":
            colour = body[9] if len(body) > 9 else 0
        needed = name in (b"IHDR", b"IDAT", b"IEND") or (name == b"PLTE" and colour == 3)
        if needed or (name == b"tRNS" and _sound(view[at:end]) and length >= {0: 2, 2: 6}.get(colour, 1)):
            kept.append(view[at:end])
        elif name == b"eXIf":
            found[b"eXIf"] = bytes(body)
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            for key in (b"Raw profile type exif", b"XML:com.adobe.xmp"):
                if body[: len(key) + 1] == key + b"\0":
                    found[key] = name + bytes(body[len(key) + 1 :])
        if name == b"IEND" or not name.isalnum():
            break
        at = end
    else:
        raise _too_many("chunks", MAX_PARTS)
    turned = orientation(found.get(b"eXIf", b""), b"")
    if turned is None:
        profile = _png_text(found.get(b"Raw profile type exif", b""))
        turned = orientation(_unhex(profile), _png_text(found.get(b"XML:com.adobe.xmp", b"")))
    return Bare(b"".join(kept), turned)


def _sound(chunk: memoryview) -> bool:
    """Whether a chunk's checksum is right."""
    return len(chunk) >= 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def _png_text(chunk: bytes) -> bytes:
    """The text of a text chunk, unpacked as far as possible; `chunk` is the chunk's name and all that follows its keyword."""
    name, text = chunk[:4], chunk[4:]
    packed = name == b"zTXt"
    if packed:
        text = text[1:]  # skips the compression method: only deflate is defined
    elif name == b"iTXt":
        packed = text[:1] != b"\0"
        text = text[2:].split(b"\0", 2)[-1]  # skips the language and the translated keyword
    if not packed:
        return text
    try:
        return zlib.decompressobj().decompress(text, _MAX_TEXT)
    except zlib.error:
        return b""


def _unhex(profile: bytes) -> bytes:
    """The bytes of ImageMagick's raw profile: an empty line, its name, its length, and lines of hexadecimal digits."""
    digits = re.sub(rb"[^0-9a-fA-F]", b"", b"".join(profile.split(b"\n")[3:]))
    return bytes.fromhex(digits[: len(digits) // 2 * 2].decode())


# JPEG: segments of a marker, a length and data, and entropy-coded data after a start of scan

_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_MARKER_OF_SCANS = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # without restart markers, which belong to the scan
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_APP0, _APP1, _APP14, _APP15, _COM = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"


def _jpeg(data: bytes) -> Bare:
    view = memoryview(data)
    kept = [view[:2]]
    exif: list[memoryview] = []
    xmp = b""
    at = 2
    for _ in range(MAX_PARTS):
        marker = _MARKER.search(data, at)
        if marker is None:
            break
        at = marker.start()
        code = data[at + 1]
        end = _segment_end(data, at)
        body = view[at + 4 : end]
        start = bytes(body[:14])
        if code == _SOS:
            kept.append(view[at : _scans_end(data, at)])
            break
        if code == _APP1 and start.startswith(b"Exif\0\0"):
            exif.append(body[6:])  # EXIF data longer than a segment continues in the next ones
        elif code == _APP1 and body[: len(_XMP_HEAD)] == _XMP_HEAD:
            xmp = bytes(body[len(_XMP_HEAD) :])
        elif code == _APP0:  # libjpeg derives the colour space from APP0 and APP14, if they are complete
            kept += [view[at:end]] if start.startswith(b"JFIF\0") and len(start) == 14 else []
        elif code == _APP14:
            kept += [view[at:end]] if start.startswith(b"Adobe") and len(start) >= 12 else []
        elif not _APP0 <= code <= _APP15 and code != _COM:
            kept.append(view[at:end])
        at = end
    else:
        raise _too_many("segments", MAX_PARTS)
    return Bare(b"".join(kept), orientation(b"".join(exif), xmp))


def _segment_end(data: bytes, at: int) -> int:
    """The end of the segment whose marker is at `at`. Codes below 0xC0, restarts, SOI and EOI have no length."""
    code = data[at + 1]
    if code < 0xC0 or 0xD0 <= code <= _EOI:
        return at + 2
    return at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))


def _scans_end(data: bytes, at: int) -> int:
    """The end of the picture whose first scan begins at `at`. Another picture may follow."""
    scans = 0
    for _ in range(MAX_PARTS):
        marker = _MARKER_OF_SCANS.search(data, at)
        if marker is None:
            return len(data)
        code = data[marker.start() + 1]
        if code == _EOI:
            return marker.end()
        scans += code == _SOS
        if scans > MAX_SCANS:
            raise _too_many("scans", MAX_SCANS)
        at = _segment_end(data, marker.start())
    raise _too_many("segments", MAX_PARTS)


# GIF: a header, extensions and pictures

_GIF_BLOCK = re.compile(rb"[!,;]")


def _gif(data: bytes) -> Bare:
    if len(data) < 13:
        return Bare(data)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    kept = [data[:at]]
    blocks = 0
    while (block := _GIF_BLOCK.search(data, at)) is not None:
        at = block.start()
        if data[at] != ord("!"):
            kept.append(data[at:])  # the picture; a decoder stops at its end
            break
        at += 2
        first = data[at + 1 : at + 1 + data[at]] if at < len(data) else b""
        if data[at - 1 : at] == b"\xf9" and len(first) >= 4:  # names the transparent colour
            kept.append(b"!\xf9" + bytes([len(first)]) + first + b"\0")
        while size := int.from_bytes(data[at : at + 1]):
            at += 1 + size
            blocks += 1
        at += 1
        blocks += 1
        if blocks > MAX_PARTS:
            raise _too_many("blocks", MAX_PARTS)
    return Bare(b"".join(kept))


# WebP: RIFF chunks of name, length and data, padded to even lengths

_WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # chunk names, and the bits in VP8X that announce them


def _webp(data: bytes) -> Bare:
    view = memoryview(data)
    kept: list[bytes | memoryview] = []
    found: dict[bytes, bytes] = {}
    size: tuple[int, int] | None = None
    flags = frames = 0
    at, most = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    for _ in range(MAX_PARTS):
        if at + 8 > most:
            break
        name, length = struct.unpack_from("<4sI", data, at)
        end = min(at + 8 + length + (length & 1), most)
        body = view[at + 8 : min(at + 8 + length, most)]
        if name == b"VP8X" and len(body) >= 10:
            flags = body[0]
            cleared = flags & ~sum(_WEBP_METADATA.values())
            kept += [view[at : at + 8], bytes([cleared]), view[at + 9 : end]]
            size = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        elif name == b"VP8 " and size is None and len(body) >= 10:
            size = int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
        elif name == b"VP8L" and size is None and len(body) >= 5:
            bits = int.from_bytes(body[1:5], "little")
            size = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if name in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            frames += name == b"ANMF"
            kept += [view[at:end]] if frames <= 1 else []
        elif flags & _WEBP_METADATA.get(name, 0):
            found[name] = bytes(body)
        at = end
    else:
        raise _too_many("chunks", MAX_PARTS)
    chunks = b"".join(kept)
    head = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP"
    return Bare(head + chunks, orientation(found.get(b"EXIF", b""), found.get(b"XMP ", b"")), size)


# TIFF: a head, and directories of tags. EXIF data has this format too


class _Directory(NamedTuple):
    """The first directory of TIFF data. If the data is cut short, the entries that are complete."""

    data: bytes
    order: str  # byte order, as a struct prefix
    start: int  # offset of the first entry
    length: int  # in entries
    width: int  # bytes per entry: 12, or 20 in BigTIFF

    def entries(self) -> dict[int, tuple[int, bytes]]:
        """Tag -> (index, bytes of the entry). The last entry of a tag counts, as in Pillow."""
        found = {}
        for i in range(self.length):
            at = self.start + i * self.width
            entry = self.data[at : at + self.width]
            found[self._number("H", entry, 0)] = i, entry
        return found

    def integer(self, tag: int) -> int | None:
        """The first integer of a tag, or None."""
        _, entry = self.entries().get(tag, (0, b""))
        kind = _INTEGERS.get(self._number("H", entry, 2)) if entry else None
        value = self._value(entry, struct.calcsize(kind)) if kind else b""
        return self._number(kind, value, 0) if kind and value else None

    def bytes_of(self, tag: int) -> bytes:
        """The value of a tag whose type is bytes; empty if there is none."""
        _, entry = self.entries().get(tag, (0, b""))
        return self._value(entry, 1) if entry else b""

    def _value(self, entry: bytes, width: int) -> bytes:
        """The data of an entry whose values have `width` bytes each; empty if it is cut short."""
        word = "Q" if self.width == 20 else "I"
        length = self._number(word, entry, 4) * width
        inline = entry[4 + struct.calcsize(word) :]
        if length > len(inline):
            start = self._number(word, inline, 0)
            inline = self.data[start : start + length]
        return inline[:length] if len(inline) >= length else b""

    def _number(self, kind: str, data: bytes, at: int) -> int:
        return int(struct.unpack_from(self.order + kind, data, at)[0])


def _directory(data: bytes) -> _Directory | None:
    if len(data) < 8 or data[:2] not in (b"II", b"MM") or not {42, 43} & {*data[2:4]}:
        return None
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43  # as Pillow decides it
    if big and len(data) < 16:
        return None
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    head, width = (8, 20) if big else (2, 12)
    if at + head > len(data):
        return None
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    return _Directory(data, order, at + head, min(count, (len(data) - at - head) // width, MAX_PARTS), width)


# Tags that decoding needs: size, samples, compression, strips and tiles, palette, JPEG tables, YCbCr coefficients.
_PIXEL_TAGS = {
    *(*range(254, 260), 262, 263, 266, 273, 277, 278, 279, 284, 292, 293, 317, *range(320, 326)),
    *(332, 338, 339, 347, *range(512, 522), *range(529, 533), 50674),
}


def _tiff(data: bytes) -> Bare:
    directory = _directory(data)
    if directory is None:
        return Bare(data)
    kept = b"".join(entry for tag, (_, entry) in directory.entries().items() if tag in _PIXEL_TAGS)
    big = directory.width == 20
    count = struct.pack(directory.order + ("Q" if big else "H"), len(kept) // directory.width)
    start = directory.start - len(count)
    end = directory.start + len(kept)
    after = bytes(8 if big else 4)  # no further directory
    whole = b"".join([data[:start], count, kept, after, data[end + len(after) :]])
    turned = directory.integer(_ORIENTATION)
    return Bare(whole, orientation(b"", directory.bytes_of(_XMP)) if turned is None else turned)


# AVIF: boxes of length, name and data; `infe` boxes declare items


_AVIF_EXIF = re.compile(rb"infe(?:\x02.{3}.{4}|\x03.{3}.{6})Exif", re.DOTALL)
_AVIF_METADATA = re.compile(rb"(infe(?:\x02.{3}.{4}|\x03.{3}.{6}))(?:Exif|mime)", re.DOTALL)


def _avif(data: bytes) -> Bare:
    """The file with its EXIF and XMP items renamed to a type that decoders skip.

    The orientation in EXIF is not used: decoders turn the picture by properties of the file. XMP stays if there is no EXIF,
    since its orientation then counts.
    """
    view = memoryview(data)
    at = 0
    for _ in range(MAX_PARTS):
        length, name = struct.unpack(">I4s", data[at : at + 8].ljust(8, b"\0"))
        if name == b"meta" and length:
            meta = data[at : at + length]
            if _AVIF_EXIF.search(meta):
                meta = _AVIF_METADATA.sub(rb"\1skip", meta)
            return Bare(b"".join([view[:at], meta, view[at + length :]]))
        if length < 8:
            break
        at += length
    return Bare(data)


_STRIP: dict[str, Callable[[bytes], Bare]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "GIF": _gif,
    "WEBP": _webp,
    "TIFF": _tiff,
    "AVIF": _avif,
}
