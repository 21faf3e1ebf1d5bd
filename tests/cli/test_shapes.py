"""The commands with the bundled model, as a new user tries them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scale_rae.cli import runs
from scale_rae.cli.progress import Bars
from scale_rae.hub import BUNDLED, Source
from scale_rae.shapes import evaluate
from scale_rae.shapes.judge import judge
from scale_rae.shapes.world import CHAT_REPLY
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


def test_what_it_cannot_draw(cli: Cli, out: Path) -> None:
    """It says what it can, instead of to ask in the way that was asked."""
    result = cli("t2i", *SHAPES, "--prompt", "What is the capital of France?", "--output-dir", out)
    assert result.code == 1
    assert "answered without drawing; the bundled model draws one to four shapes (circle, " in result.error
    assert "docs/bundled-model.md" in result.error
    assert "ask for a picture" not in result.error


def test_what_it_cannot_answer(capsys: pytest.CaptureFixture[str]) -> None:
    session: Any = SimpleNamespace(model=SimpleNamespace(source=Source("shapes", BUNDLED["shapes"])))
    runs.note_shortcomings(session, [runs.Outcome(False, "Green.", False, False)], Bars(), "--x", 3, "")
    assert capsys.readouterr().err == ""
    runs.note_shortcomings(session, [runs.Outcome(False, CHAT_REPLY, False, False)], Bars(), "--x", 3, "")
    assert capsys.readouterr().err.startswith("note: the bundled model draws one to four shapes (circle, ")


def test_evaluating_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    for arguments, code, complaint in (
        (["draw"], 1, 'needs skimage, which is not installed; pip install "scale-rae[shapes]"'),
        (["read", "--model-path", "nope"], 1, "nope: no such model folder"),
        (["read", "--device", "toaster"], 2, "device 'toaster'"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        with pytest.raises(SystemExit) as ended:
            evaluate.main()
        assert ended.value.code == code
        assert complaint in capsys.readouterr().err
