from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from scale_rae.cli import main
from scale_rae.scaling.sheet import KEPT
from tests.helpers.made_experiment import write_experiment
from tests.scaling.test_select import digest, names

FRAME = tuple(bytes.fromhex(KEPT[1:]))


def framed(sheet: Image.Image) -> int:
    """Pixels of the frames around kept images."""
    return sum(n for n, colour in sheet.getcolors(1 << 24) or [] if colour == FRAME)


def test_the_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_experiment(tmp_path / "2_scale", 3, texts=("a very long prompt " * 60, "", "緑\x00\x1b"))
    before = digest(folder)
    assert main(["sheet", str(folder), "--thumbnail", "60", "--keep", "3"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / '2_scale_sheet.png'}\n"
    assert names(tmp_path) == ["2_scale", "2_scale_sheet.png"]
    assert digest(folder) == before
    with Image.open(tmp_path / "2_scale_sheet.png") as sheet:
        assert framed(sheet) == 3 * 3 * (66**2 - 60**2)


def test_columns_limit_and_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_experiment(tmp_path / "e", 12, 2, 2)
    target = tmp_path / "x.png"
    sizes = []
    for options in (["--columns", "1"], ["--columns", "5"], ["--limit", "1"], []):
        assert main(["sheet", str(folder), "-o", str(target), "--metric", "loss", *options]) == 0
        with Image.open(target) as sheet:
            sizes.append(sheet.size)
    assert sizes[0][1] > sizes[3][1] > sizes[1][1]
    assert sizes[1][0] > sizes[3][0] >= sizes[0][0]
    assert sizes[2][0] == sizes[0][0]
    assert "the first 1 of 12 prompts" in capsys.readouterr().err


def test_the_order_is_the_metrics(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "e", 4)
    sheets = {}
    for options in (["--metric", "combined"], ["--metric", "image_conf"], ["--reward-weight", "0"]):
        target = tmp_path / "x.png"
        assert main(["sheet", str(folder), "-o", str(target), *options]) == 0
        sheets[" ".join(options)] = target.read_bytes()
    assert len(set(sheets.values())) == 3


def test_captions_have_a_font_that_has_their_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cyrillic stands for Chinese, since matplotlib brings fonts with it and without it."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    brought = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    latin, more = str(brought / "cmr10.ttf"), str(brought / "DejaVuSans.ttf")
    sheets = {}
    for text in ("a cat", "кошка", "кошка 中"):
        folder = write_experiment(tmp_path / text, 1, texts=(text,))
        for fonts in ((latin,), (latin, "no such font.ttf", more)):
            monkeypatch.setattr("scale_rae.scaling.sheet.FONTS", fonts)
            target = tmp_path / "x.png"
            assert main(["sheet", str(folder), "-o", str(target)]) == 0
            sheets[text, fonts[-1]] = target.read_bytes(), capsys.readouterr().err
    assert sheets["a cat", latin] == sheets["a cat", more]
    assert sheets["кошка", latin][0] != sheets["кошка", more][0]
    assert "note: boxes stand for characters of prompts (акош): no known font here has all" in sheets["кошка", latin][1]
    assert not sheets["кошка", more][1]
    assert "of prompts (中):" in sheets["кошка 中", more][1]  # the rest has the font that has most of it
    assert "of prompts (акош中):" in sheets["кошка 中", latin][1]


def test_a_sheet_that_is_too_large_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scale_rae.scaling.sheet.LARGEST", 100_000)
    assert main(["sheet", str(write_experiment(tmp_path / "e", 2))]) == 1
    assert "choose a smaller --thumbnail than 128, or --limit N" in capsys.readouterr().err
    assert names(tmp_path) == ["e"]
