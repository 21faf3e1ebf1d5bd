from __future__ import annotations

import base64
import io
import os
import resource
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import BmpImagePlugin, Image, ImageOps, features

from scale_rae.errors import InputError
from scale_rae.images import decode_image, load_image, read_image, to_rgb
from scale_rae.serve.data_urls import read_data_url
from tests.helpers.picture_files import (
    ASCII,
    BROKEN,
    LONG,
    NONSENSE,
    RATIONAL,
    SHORT,
    SIGNED_RATIONAL,
    exif,
    picture,
    save,
    segment,
    with_exif,
)
from tests.helpers.png import chunk, with_chunk


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(int(v) for v in np.asarray(image)[y, x])


def same(loaded: Image.Image, wanted: Image.Image) -> bool:
    assert loaded.mode == "RGB"
    return np.array_equal(np.asarray(loaded), np.asarray(wanted.convert("RGB")))


def test_an_image_of_one_pixel_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "i.png")
    image = load_image(tmp_path / "i.png")
    assert image.size == (1, 1)
    assert pixel(image) == (1, 2, 3)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "i.jpg", quality=100)
    red, green, blue = pixel(load_image(tmp_path / "i.jpg"))
    assert red > 200
    assert max(green, blue) < 60


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "i.png", transparency=0)
    loaded = load_image(tmp_path / "i.png")
    assert pixel(loaded, 0) == (255, 255, 255)
    assert pixel(loaded, 1) == (40, 50, 60)


def test_half_transparent(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "i.png")
    assert pixel(load_image(tmp_path / "i.png")) == (127, 127, 127)
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "la.png")
    assert pixel(load_image(tmp_path / "la.png")) == (255, 255, 255)


def test_transparent_colour_of_rgb_and_grey(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (5, 6, 7)).save(tmp_path / "i.png", transparency=(5, 6, 7))
    assert pixel(load_image(tmp_path / "i.png")) == (255, 255, 255)
    Image.new("L", (2, 2), 5).save(tmp_path / "l.png", transparency=5)
    assert pixel(load_image(tmp_path / "l.png")) == (255, 255, 255)


@pytest.mark.parametrize("value", [0, 257, 40_000, 65_535])
def test_sixteen_bits(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((2, 2), value, np.uint16)).save(tmp_path / "i.png")
    assert pixel(load_image(tmp_path / "i.png")) == (value // 257,) * 3


def test_one_bit_and_grey(tmp_path: Path) -> None:
    Image.new("1", (2, 2), 1).save(tmp_path / "i.png")
    assert pixel(load_image(tmp_path / "i.png")) == (255, 255, 255)
    Image.new("L", (2, 2), 9).save(tmp_path / "l.png")
    assert pixel(load_image(tmp_path / "l.png")) == (9, 9, 9)


def test_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored top is the picture's right
    stored = Image.new("RGB", (4, 2), "white")
    stored.putpixel((0, 0), (0, 0, 0))
    stored.save(tmp_path / "i.png", exif=exif)
    image = load_image(tmp_path / "i.png")
    assert image.size == (2, 4)
    assert pixel(image, 1, 0) == (0, 0, 0)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "i.gif", save_all=True, append_images=frames[1:])
    assert pixel(load_image(tmp_path / "i.gif")) == (255, 0, 0)


def test_what_is_no_image_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.jpg", "empty.png"):
        with pytest.raises(InputError, match=rf"{name}: not an image"):
            load_image(tmp_path / name)
    with pytest.raises(InputError, match="no such image"):
        load_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="floating-point"):
        to_rgb(Image.new("F", (2, 2)))


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_an_image_that_is_cut_short_is_refused(tmp_path: Path, kind: str, part: float) -> None:
    path = tmp_path / f"i.{kind}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(InputError, match=f"i.{kind}: "):
        load_image(path)


def test_damaged_within(tmp_path: Path) -> None:
    path = tmp_path / "i.png"
    Image.effect_noise((64, 64), 80).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        load_image(path)


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_001, 10_000)])
def test_too_large_is_refused_without_reading_it(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "i.png"
    Image.new("1", size).save(path)  # 400 million pixels in 50 kB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="too large"):
        load_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG after the pixels", "PNG as ImageMagick", "WEBP"])
@pytest.mark.parametrize("how", BROKEN)
def test_the_orientation_is_read_although_other_metadata_is_broken(kind: str, how: str) -> None:
    upright = decode_image(save(kind.split()[0]), "plain")
    turned = decode_image(with_exif(kind, BROKEN[how]), "photo")
    assert same(turned, upright.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG after the pixels", "PNG as ImageMagick", "WEBP"])
@pytest.mark.parametrize("how", NONSENSE)
def test_metadata_that_cannot_be_read_is_ignored(kind: str, how: str) -> None:
    assert same(decode_image(with_exif(kind, NONSENSE[how]), "photo"), decode_image(save(kind.split()[0]), "plain"))


@pytest.mark.parametrize("method", range(1, 10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_as_pillow_turns_it(kind: str, method: int) -> None:
    tag = Image.Exif()
    tag[0x0112] = method
    data = save(kind, exif=tag)
    with Image.open(io.BytesIO(data)) as image:
        assert same(decode_image(data, "photo"), ImageOps.exif_transpose(image))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "data",
    [
        save("JPEG")[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP) + save("JPEG")[2:],
        with_chunk(save("PNG"), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        with_chunk(save("PNG"), chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
        save("TIFF", tiffinfo={700: XMP}),
        save("WEBP", xmp=XMP),
    ],
    ids=["jpeg", "png", "png, packed", "tiff", "webp"],
)
def test_an_orientation_of_xmp(data: bytes) -> None:
    assert decode_image(data, "photo").size == picture().size[::-1]


def profile(data: bytes, method: bytes = b"\0") -> bytes:
    return b"icc\0" + method + data


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"zTXt", b"note\0\0no zlib"),
        chunk(b"zTXt", b"note\0\x07" + zlib.compress(b"text")),
        chunk(b"iTXt", b"note\0\1\0\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"iTXt", b"note"),
        chunk(b"iTXt", b"note\0\1\1\0\0no zlib"),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nno hexadecimal digits"),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 9\n" + b"45" * 2_000_000)),
        chunk(b"iCCP", profile(zlib.compress(bytes(2_000_000)))),
        chunk(b"iCCP", profile(b"", b"\x09")),
        chunk(b"iCCP", b""),
        chunk(b"tEXt", b"note\0text", checksum=1),
        chunk(b"eXIf", b"II*\0", checksum=1),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"\0"),
        chunk(b"pHYs", b"\0"),
        chunk(b"sRGB", b""),
        chunk(b"acTL", b""),
        chunk(b"fcTL", b"\0" * 26) * 2,
        chunk(b"tRNS", b"\0"),
        chunk(b"tRNS", bytes(6), checksum=1),
        chunk(b"PLTE", b"\1\2\3", checksum=1),  # only a suggestion, in a picture without a palette
    ],
    ids=lambda extra: extra[4:24],
)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_chunks_beside_the_pixels_may_be_broken(extra: bytes, before: bytes) -> None:
    assert same(decode_image(with_chunk(save("PNG"), extra, before), "photo"), picture())


@pytest.mark.parametrize(
    "extra",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xE0, b"JFIF"),
        segment(0xE1, b"Exif"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"ICC_PROFILE\0\x01\x09nothing"),
        segment(0xE2, b"MPF\0II*\0"),
        segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\xff\xff"),
        segment(0xE2, b"FPXR\0"),
        segment(0xED, b"Photoshop 3.0\x008BIM"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x02\0\0"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff"),
        segment(0xEE, b"Adobe"),
        segment(0xFE, b"\xff\xd9\xff\xda"),
        segment(0xFE, b""),
        segment(0xE5, bytes(60_000)) * 20,
    ],
    ids=lambda extra: repr(extra[:24]),
)
def test_segments_beside_the_pixels_may_be_broken(extra: bytes) -> None:
    plain = save("JPEG")
    assert same(decode_image(plain[:2] + extra + plain[2:], "photo"), decode_image(plain, "plain"))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize(
    "entry",
    [
        (282, ASCII, 4, 0x636261),  # XResolution
        (282, SIGNED_RATIONAL, 1, 0),
        (283, RATIONAL, 1, 0xFFFFFFF0),
        (305, SHORT, 1, 7),  # Software
        (700, LONG, 1, 0xFFFFFFFF),  # XMP
        (34665, ASCII, 4, 0x636261),  # EXIF
        (34665, LONG, 1, 8),
        (34853, LONG, 1, 0xFFFFFFF0),  # GPS
        (34675, 99, 1, 1),  # ICC
        (33432, ASCII, 0xFFFFFFFF, 0xFFFFFFFF),  # Copyright
    ],
)
def test_tags_beside_the_pixels_may_be_broken(compression: str | None, entry: tuple[int, int, int, int]) -> None:
    plain = save("TIFF", compression=compression)
    (start,) = struct.unpack_from("<I", plain, 4)
    (count,) = struct.unpack_from("<H", plain, start)
    entries = [plain[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    entries = sorted([*entries, struct.pack("<HHII", *entry)], key=lambda e: struct.unpack_from("<H", e)[0])
    directory = struct.pack("<H", count + 1) + b"".join(entries) + struct.pack("<I", 8)  # and the next one is anywhere
    data = plain[:4] + struct.pack("<I", len(plain)) + plain[8:] + directory
    assert same(decode_image(data, "photo"), decode_image(plain, "plain"))


@pytest.mark.parametrize("part", [b"EXIF", b"XMP ", b"ICCP", b"oops"])
@pytest.mark.parametrize("length", [0, 3, 0x7FFFFFFF])
def test_chunks_of_a_webp_may_be_broken(part: bytes, length: int) -> None:
    whole = bytearray(with_exif("WEBP", b"Exif"))
    at = whole.index(b"EXIF")
    whole[at : at + 8] = part + struct.pack("<I", length)
    assert same(decode_image(bytes(whole), "photo"), picture())


@pytest.mark.skipif("avif" not in features.modules or not features.check("avif"), reason="this Pillow has no AVIF")
def test_exif_of_an_avif_may_be_broken() -> None:
    plain = save("AVIF", quality=100)
    tagged = save("AVIF", quality=100, exif=exif((0x0131, ASCII, 4, 0x636261)))
    assert tagged.count(b"II*\0") == 1
    assert same(decode_image(tagged.replace(b"II*\0", b"nope"), "photo"), decode_image(plain, "plain"))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_the_first_frame_is_as_pillow_shows_it(kind: str) -> None:
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180), Image.new("RGB", picture().size)]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=100, **options)
    with Image.open(buffer) as image:
        assert getattr(image, "n_frames", 1) == 3
        assert same(decode_image(buffer.getvalue(), "frames"), image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_good_files_decode_as_they_always_did(kind: str, mode: str) -> None:
    image = Image.fromarray(np.arange(0, 65536, 64, np.uint16).reshape(32, 32))
    if mode != "I;16":
        image = picture().convert(mode)
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind)
        Image.open(buffer).load()
    except (OSError, KeyError, ValueError):
        pytest.skip(f"Pillow saves or reads no {mode} as {kind}")
    with Image.open(buffer) as plain:
        assert same(decode_image(buffer.getvalue(), "image"), to_rgb(plain))


def test_sixteen_bits_are_scaled_also_where_transparency_is_dropped() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(0, 65536, 64, np.uint16).reshape(32, 32)).save(buffer, "PNG")
    seen = np.asarray(decode_image(buffer.getvalue(), "image", on_white=False))
    np.testing.assert_array_equal(seen[..., 0].ravel(), np.arange(0, 65536, 64) // 257)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "most", "seen"),
    [
        ("i4", 255, lambda v: v),
        ("i4", 65_535, lambda v: v // 257),
        ("i4", 2**31 - 1, lambda v: v >> 23),
        ("i4", 100_000, lambda v: v >> 9),
        ("u4", 255, lambda v: v),
        ("u4", 2**32 - 1, lambda v: v >> 24),
        ("i2", 255, lambda v: v),
        ("i2", 32_767, lambda v: v // 257),
        ("u2", 65_535, lambda v: v // 257),
        ("u2", 255, lambda v: v // 257),  # 16 bits are 16 bits, however dark
    ],
)
def test_integers_of_a_tiff(kind: str, most: int, seen: Callable[[np.ndarray], np.ndarray], order: str) -> None:
    values = np.linspace(0, most, 20 * 10).astype(np.int64).reshape(10, 20)
    data = grey_tiff(values.astype(order + kind))
    if (kind, order) == ("u4", ">"):
        with pytest.raises(InputError, match="cannot be read"):  # Pillow has no such mode
            decode_image(data, "grey")
        return
    assert same(decode_image(data, "grey"), Image.fromarray(seen(values).astype(np.uint8)))


def test_a_dark_image_of_sixteen_bits_stays_dark() -> None:
    assert pixel(decode_image(b"P5 1 1 65535 \0\xff", "dark.pgm")) == (0, 0, 0)


def test_negative_integers_are_black() -> None:
    loaded = decode_image(grey_tiff(np.array([[-5, 0, 255]], "<i4")), "grey")
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 255]
    assert pixel(to_rgb(Image.new("I", (2, 2), -7))) == (0, 0, 0)


def grey_tiff(values: np.ndarray) -> bytes:
    """A TIFF of integers, as tools of science write it."""
    order = "<" if values.dtype.byteorder in "<=" else ">"
    height, width = values.shape
    bits, signed = 8 * values.itemsize, values.dtype.kind == "i"
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 200, 277: 1, 278: height}
    tags |= {279: values.nbytes, 339: 2 if signed else 1}
    entries = [
        (tag, SHORT if tag in (258, 259, 262, 277, 339) else LONG, 1, value) for tag, value in sorted(tags.items())
    ]
    return exif(*entries, order=order, after=b"").ljust(200, b"\0") + values.tobytes()


def test_a_floating_point_file_is_named(tmp_path: Path) -> None:
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    with pytest.raises(InputError, match=r"f\.tif: floating-point"):
        load_image(tmp_path / "f.tif")


def test_pillow_warns_of_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    large = io.BytesIO()
    Image.new("1", (9_500, 9_500)).save(large, "PNG")  # over the size that Pillow warns of
    many = exif((258, SHORT, 1, 8), order="<")[:-64]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode_image(large.getvalue(), "large").size == (9_500, 9_500)
        for data in BROKEN.values():
            decode_image(with_exif("JPEG", data), "photo")
        for data in (many, struct.pack("<2sHIHHHII", b"II", 42, 8, 1, 277, LONG, 1, 0xFFFFFFFF)):
            with pytest.raises(InputError):
                decode_image(data, "broken")
    assert not caught
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        struct.error("a"), TypeError("a"), RuntimeError("a"), KeyError("a"), ZeroDivisionError("a"), OverflowError("a"),
        zlib.error("a"), AttributeError("a"), RecursionError("a"), AssertionError(), UnicodeDecodeError("utf-8", b"", 0, 1, "a"),
        NotImplementedError("a"), EOFError(), ValueError("a\nb\x1b[2J"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_any_error_of_a_decoder_is_one_line_that_names_the_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Image.Image) -> None:
        raise error

    picture().save(tmp_path / "i.bmp")
    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", load)
    with pytest.raises(InputError, match=r"i\.bmp: the image is damaged or cannot be read \(") as caught:
        load_image(tmp_path / "i.bmp")
    assert str(caught.value).isprintable()


def test_no_memory_is_not_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", load)
    with pytest.raises(InputError, match="i: there is not enough memory"):
        decode_image(save("BMP"), "i")


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(save("PNG")), daemon=True)
    writer.start()
    assert read_image(path) == save("PNG")
    writer.join()


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "~nosuch/x", "x" * 300, "a\0b", "caf\udce9.png", "."])
def test_what_is_no_file_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_image(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_data_url_imports_no_torch() -> None:
    url = "data:image/png;charset=utf-8;base64," + base64.b64encode(save("PNG")).decode()
    code = f"""
import sys
from scale_rae.serve.data_urls import read_data_url
assert read_data_url({url!r}, "it", 1000).size == (40, 24)
assert not {{"torch", "transformers", "fastapi", "starlette"}} & {{*sys.modules}}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "head",
    ["data:image/png;base64", "DATA:image/PNG;charset=utf-8;base64", "data:image/png;name=a.png;charset=x;BASE64"],
)
def test_a_data_url_may_have_parameters(head: str) -> None:
    text = base64.b64encode(save("PNG")).decode()
    for url in (f"{head},{text}", f"{head},{text[:50]}\n {text[50:]}", f"{head},{text.replace('=', '%3D')}"):
        assert same(read_data_url(url, "it", 1000), picture())


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:image/svg+xml;base64,AAAA",
        "data:;base64,AAAA",
        "data:image/png;base64;x,AAAA",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,AA*A",
        "data:image/png;base64,%ff",
        "data:image/png;base64,é",
        "data:image/png;base64,\ud800",
        "",
        ",",
        "x",
    ],
)
def test_what_is_no_data_url_of_an_image(url: str) -> None:
    with pytest.raises(InputError, match=r"^field: "):
        read_data_url(url, "field", 1000)
