"""The commands with the bundled model, as a new user tries them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scale_rae.shapes.judge import judge
from tests.cli.conftest import Cli

SHAPES = ("--model-path", "shapes", "--device", "cpu")
PROMPT = "Can you generate a photo of a blue cross and a pink square?"
WANTED = {
    "tag": "color_attr",
    "include": [{"class": "cross", "count": 1, "color": "blue"}, {"class": "square", "count": 1, "color": "pink"}],
}
FAST = ("--solver", "dpmpp_2m", "--steps", 16, "--guidance-level", 2)


@pytest.fixture
def drawn(cli: Cli, out: Path) -> Path:
    """The manifest of one drawing."""
    assert cli("t2i", *SHAPES, "--prompt", PROMPT, *FAST, "--save-latent", "--output-dir", out).code == 0
    return next(out.glob("*_manifest.json"))


def test_demo_draws_what_it_says(drawn: Path) -> None:
    picture = next(drawn.parent.glob("*.png"))
    verdict = judge(Image.open(picture), WANTED)
    assert verdict.correct, verdict.reason


def test_manifest_draws_the_same_picture_in_any_checkout(cli: Cli, drawn: Path, tmp_path: Path) -> None:
    manifest = json.loads(drawn.read_text())
    for part in ("model", "encoder", "decoder"):
        assert not Path(manifest[part]["name"]).is_absolute(), part
    assert "merges.txt" in manifest["model"]["files"]
    assert cli("t2i", "--from-manifest", drawn, "--output-dir", tmp_path / "again").code == 0
    again = next((tmp_path / "again").glob("*.png"))
    assert (np.asarray(Image.open(again)) == np.asarray(Image.open(next(drawn.parent.glob("*.png"))))).all()


def test_look_at_picture_and_latent(cli: Cli, drawn: Path, tmp_path: Path) -> None:
    picture, latent = next(drawn.parent.glob("*.png")), next(drawn.parent.glob("*_latent.pt"))
    asked = cli("img", *SHAPES, "--image", picture, "--prompt", "Describe this image.", "--output-dir", tmp_path)
    assert "blue cross" in asked.out
    assert "pink square" in asked.out
    question = "Does this image align with the prompt: a photo of a blue cross and a pink square?"
    asked = cli("latent", *SHAPES, "--latent", latent, "--action", "qa", "--prompt", question, "--output-dir", tmp_path)
    assert asked.out.startswith("Yes.")
