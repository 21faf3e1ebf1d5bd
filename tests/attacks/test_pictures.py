"""What a picture's file tries against whoever opens it: other programs, endless work, endless memory, odd errors."""

from __future__ import annotations

import base64
import io
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from scale_rae import containers, images
from scale_rae.errors import InputError
from scale_rae.images import decode_image, load_image
from scale_rae.serve.data_urls import read_data_url
from tests.helpers.picture_files import BROKEN, exif, picture, riff, save, segment, with_exif
from tests.helpers.png import SIGNATURE, chunk, png_of_size, with_chunk

pytestmark = pytest.mark.attack

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%id) (w) file\nshowpage\n%%EOF\n"


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a file reaches Pillow."""
    monkeypatch.setattr(images.Image, "open", lambda *_, **__: pytest.fail("a decoder saw the file"))


# Other formats and other programs


@pytest.mark.parametrize("start", [b"", b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20)])
@pytest.mark.parametrize("name", ["holiday.png", "holiday.eps", "holiday.jpg"])
def test_postscript_starts_no_program(
    start: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_decoder: None
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / name).write_bytes(start + EPS)
    with pytest.raises(InputError, match=f"{name}: not an image"):
        load_image(tmp_path / name)
    with pytest.raises(InputError, match="field: not an image"):
        read_data_url(url(start + EPS), "field", 1000)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "DDS", "SGI", "IM", "ICNS", "QOI", "SPIDER", "MSP"])
def test_formats_that_nobody_needs_are_not_opened(kind: str, no_decoder: None) -> None:
    buffer = io.BytesIO()
    try:
        picture().convert("1" if kind == "MSP" else "F" if kind == "SPIDER" else "RGB").save(buffer, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow saves no {kind}")
    with pytest.raises(InputError, match=r"picture.png: not an image"):
        decode_image(buffer.getvalue(), "picture.png")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"P", b"BM", b"GIF", b"II*\0", b"MM\0*\0\0\0\x08", b"\xff\xd8\xff", SIGNATURE),
        *(b"RIFF\xff\xff\xff\xffWEBP", b"RIFF\0\0\0\0WEBPVP8X", b"\0\0\0\x0cftypavif"),
        *(b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>", b"%PDF-1.7\n", b"8BPS\0\1" + bytes(30)),
        *(b"\xd7\xcd\xc6\x9a" + bytes(40), b"SIMPLE  =                    T", b"\x89HDF\r\n\x1a\n" + bytes(20)),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_beginnings_of_files(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^it: "):
        decode_image(data, "it")


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PPM", "AVIF", "JPEG2000"])
def test_a_server_opens_fewer_formats(kind: str, no_decoder: None) -> None:
    try:
        data = save(kind)
    except KeyError:
        pytest.skip(f"this Pillow has no {kind}")
    with pytest.raises(InputError, match="field: not an image"):
        read_data_url(url(data), "field", 1_000_000)


# Work


def progressive(more: int, between: bytes = b"") -> bytes:
    """A JPEG with `more` scans than it needs."""
    data = save("JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + (between + data[last:end]) * more + data[end:]


def test_a_jpeg_of_thousands_of_scans(no_decoder: None) -> None:
    with pytest.raises(InputError, match="more than 100 scans"):
        decode_image(progressive(5_000), "it")
    with pytest.raises(InputError, match=r"field: .*more than 100 scans"):
        read_data_url(url(progressive(5_000)), "field", 1_000_000)


@pytest.mark.parametrize(
    "between", [b"\xff\x35\xff\xff", b"\xff\x01", b"\xff\xd8", b"\xff\xff\xff", segment(0xFE, bytes(40)), b"\xff\xd0"]
)
def test_scans_hidden_behind_other_markers_are_counted(between: bytes, no_decoder: None) -> None:
    with pytest.raises(InputError, match="more than 100 scans"):
        decode_image(progressive(500, between), "it")


def test_scans_after_the_end_are_not_decoded() -> None:
    plain = save("JPEG")
    bomb = plain + progressive(5_000)[2:]
    assert len(containers.bare(bomb, "JPEG").data) <= len(plain)
    assert np.array_equal(decode_image(bomb, "it"), decode_image(plain, "it"))


def test_a_jpeg_as_an_editor_saves_it_has_few_enough_scans() -> None:
    decode_image(save("JPEG", progressive=True), "it")
    decode_image(progressive(80), "it")


def gif(extensions: bytes) -> bytes:
    plain = save("GIF")
    at = 13 + (3 << (plain[10] & 7) + 1)
    return plain[:at] + extensions + plain[at:]


COMMENT = b"!\xfe" + (b"\xff" + b"c" * 255) * 200_000 + b"\0"  # 51 MB that Pillow joins 255 bytes at a time


@pytest.mark.parametrize("extensions", [COMMENT, b"!\xfe\1c\0" * 100_000, b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0" * 10_000])
def test_a_gif_of_comments(extensions: bytes) -> None:
    assert len(containers.bare(gif(extensions), "GIF").data) <= len(save("GIF")) + 20
    decode_image(gif(extensions), "it")


def test_a_gif_of_too_many_comments(no_decoder: None) -> None:
    with pytest.raises(InputError, match="more than 250,000 blocks"):
        decode_image(gif(b"!\xfe" + b"\1c" * 300_000 + b"\0"), "it")


def animation(kind: str, frames: int) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (64, 64), (i % 256, i // 256, 9)) for i in range(frames)]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:], **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_frames_after_the_first_reach_no_decoder(kind: str) -> None:
    whole = animation(kind, 50)
    assert len(containers.bare(whole, kind).data) < len(whole) / 10
    assert np.asarray(decode_image(whole, "it"))[0, 0].tolist() == [0, 0, 9]


def test_a_tiff_of_pages_in_a_circle() -> None:
    data = save("TIFF")
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    after = start + 2 + 12 * count
    data = data[:after] + struct.pack("<I", start) + data[after + 4 :]
    assert np.array_equal(decode_image(data, "it"), picture())


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (SIGNATURE + chunk(b"tEXt", b"") * 300_000, "chunks"),
        (b"\xff\xd8" + segment(0xE1, b"Exif\0\0") * 300_000, "segments"),
        (progressive(0)[:-2] + segment(0xE1, b"") * 300_000, "segments"),
        (riff((b"VP8X", bytes(10)), *[(b"EXIF", b"")] * 300_000), "chunks"),
    ],
    ids=["png", "jpeg", "jpeg, after the scans", "webp"],
)
def test_files_of_nothing_but_parts(data: bytes, what: str, no_decoder: None) -> None:
    with pytest.raises(InputError, match=f"more than 250,000 {what}"):
        decode_image(data, "it")


# Memory


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_unpacks_to_gigabytes_is_not_unpacked(name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = zlib.compress(bytes(8 << 20))
    head = b"XML:com.adobe.xmp\0\1\0\0\0" if name == b"iTXt" else b"XML:com.adobe.xmp\0\0"
    bomb = with_chunk(save("PNG"), chunk(name, head + packed) * 300)
    unpacked: list[int] = []
    real = zlib.decompressobj

    class Counting:
        """zlib's decompressor, for this package and for Pillow."""

        def __init__(self, *arguments: int) -> None:
            self.decompressor = real(*arguments)

        def decompress(self, data: bytes, most: int = 0) -> bytes:
            text = self.decompressor.decompress(data, most)
            unpacked.append(len(text))
            return text

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    assert np.array_equal(decode_image(bomb, "it"), picture())
    assert len(unpacked) == (name != b"iCCP")  # text is unpacked once, for its orientation
    assert max(unpacked, default=0) <= 1 << 20


def webp_of_size(width: int, height: int) -> bytes:
    size = b"".join((n - 1).to_bytes(3, "little") for n in (width, height))
    return riff((b"VP8X", b"\0\0\0\0" + size), (b"VP8 ", bytes(10)))


@pytest.mark.parametrize(
    "data",
    [
        webp_of_size(16_384, 16_384),
        riff((b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383) + bytes(20))),
        riff((b"VP8L", b"\x2f" + struct.pack("<I", 16_383 | 16_383 << 14) + bytes(20))),
    ],
    ids=["extended", "lossy", "lossless"],
)
def test_a_webp_that_says_it_is_huge_reaches_no_decoder(data: bytes, no_decoder: None) -> None:
    with pytest.raises(InputError, match=r"it: the image is too large \(163"):
        decode_image(data, "it")


@pytest.mark.parametrize(
    "data",
    [
        png_of_size(2**31 - 1, 2**31 - 1),
        png_of_size(20_000, 9_000),
        save("GIF").replace(struct.pack("<HH", *picture().size), b"\xff\xff\xff\xff"),
        save("BMP").replace(struct.pack("<II", *picture().size), struct.pack("<II", 2**30, 2**30)),
        b"P6 60000 60000 255\n",
    ],
    ids=["png", "png, just above", "gif", "bmp", "ppm"],
)
def test_pixels_are_counted_before_they_are_decoded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="it: the image is too large"):
        decode_image(data, "it")


def test_a_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"sparse\.png: larger than 1 KiB"):
        images.read_bytes(path, 1024, "image")
    assert images.MAX_BYTES <= 512 << 20


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/urandom"])
def test_a_link_to_a_device_is_not_read(target: str, tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(target)
    with pytest.raises(InputError, match=r"link\.png: is not a regular file"):
        load_image(tmp_path / "link.png")


# Errors: files that were good once, with metadata, in which bits are flipped and bytes are lost


def seeds() -> dict[str, bytes]:
    tagged = BROKEN["text for a number"]
    found = {kind: with_exif(kind, tagged) for kind in ("JPEG", "PNG", "WEBP", "PNG as ImageMagick")}
    found["progressive JPEG"] = save("JPEG", progressive=True, exif=tagged, icc_profile=bytes(300), comment=b"note")
    found |= {f"TIFF {how}": save("TIFF", compression=how) for how in ("raw", "tiff_lzw", "packbits")}
    found |= {kind: save(kind) for kind in ("GIF", "BMP", "PPM")}
    found["APNG"], found["moving WEBP"] = animation("PNG", 3), animation("WEBP", 3)
    return found


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A copy with up to eight faults, half of them near the start, where metadata is."""
    copy = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(draw.choice((min(120, len(copy)), len(copy))) or 1)
        fault: Callable[[], Any] = draw.choice(
            [
                lambda at=at: copy.__setitem__(slice(at, at + 1), draw.randbytes(1)),
                lambda at=at: copy.__setitem__(slice(at, at + 4), draw.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))),
                lambda at=at: copy.__delitem__(slice(at, at + draw.randrange(1, 40))),
                lambda at=at: copy.__setitem__(slice(at, at), draw.randbytes(draw.randrange(1, 20))),
                lambda at=at: copy.__delitem__(slice(max(at, 1), None)),
            ]
        )  # fmt: skip
        fault()
    return bytes(copy)


@pytest.mark.parametrize("kind", seeds())
def test_damaged_files_are_images_or_one_clear_error(kind: str) -> None:
    draw = random.Random(kind)
    whole = seeds()[kind]
    for _ in range(150):
        data = damaged(whole, draw)
        said = "it: "
        try:
            assert decode_image(data, "it", 1_000_000).mode == "RGB"
        except InputError as e:
            said = str(e)
        assert said.startswith("it: "), data
        assert said.isprintable(), data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG as ImageMagick", "WEBP"])
def test_damage_to_metadata_alone_costs_no_pixels(kind: str) -> None:
    draw = random.Random(kind)
    upright = np.asarray(decode_image(save(kind.split()[0]), "plain"))
    seen = [upright, *(np.rot90(upright, k) for k in (1, 2, 3))]
    seen += [np.flip(v, axis=1) for v in seen]
    data = exif((0x0112, 3, 1, 6), (0x011A, 5, 1, 50), (0x0131, 2, 9, 58), (0x8769, 4, 1, 38))
    for _ in range(100):
        broken = bytearray(data)
        for _ in range(draw.choice((1, 3, 20))):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        loaded = np.asarray(decode_image(with_exif(kind, bytes(broken)), "it"))
        assert any(np.array_equal(loaded, v) for v in seen), broken
