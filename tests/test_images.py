from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scale_rae.errors import InputError
from scale_rae.images import load_image, to_rgb


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(int(v) for v in np.asarray(image)[y, x])


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "i.png")
    image = load_image(tmp_path / "i.png")
    assert image.size == (1, 1)
    assert pixel(image) == (1, 2, 3)


def test_cmyk(tmp_path: Path) -> None:
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


def test_no_images(tmp_path: Path) -> None:
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
def test_cut_short(tmp_path: Path, kind: str, part: float) -> None:
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
