from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scale_rae.images import load_image
from scale_rae.language import Reply
from scale_rae.pipeline import ScaleRAE
from tests.cli.conftest import Cli, left, only_manifest
from tests.helpers.made_checkpoints import GOLDENS

LOOK = "Can you describe what's in this image?"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """The goldens' gradient."""
    x, y = np.meshgrid(np.arange(300), np.arange(200))
    array = np.stack([x * 255 // 299, y * 255 // 199, (x + y) * 255 // 498], -1).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "gradient.png")
    return tmp_path / "gradient.png"


def test_answers_as_the_official_code(
    cli: Cli, checkpoints: dict[str, Path], models: dict[str, ScaleRAE], picture: Path, out: Path
) -> None:
    result = cli(
        *("img", "--model-path", checkpoints["webssl"], "--image", picture, "--prompt", LOOK),
        *("--max-new-tokens", 13, "--output-dir", out),
    )
    assert result.code == 0
    golden = np.load(GOLDENS / "webssl.npz")
    text = models["webssl"].tokenizer.decode(golden["img.output_ids"].tolist())
    assert result.out.strip() == text.strip() != ""
    assert result.err == "note: the answer stops at 13 tokens; --max-new-tokens allows more\n"
    manifest = only_manifest(out)
    assert manifest["mode"] == "img"
    assert manifest["image"] == str(picture)
    assert manifest["image_sha256"] == hashlib.sha256(picture.read_bytes()).hexdigest()
    assert manifest["output_text"] == text
    assert manifest["output_images"] == []
    assert manifest["decoder"] is None  # not loaded where nothing is drawn
    assert len(left(out)) == 1


def test_may_answer_with_images(
    cli: Cli, drawing_checkpoint: Path, picture: Path, out: Path, models: dict[str, ScaleRAE]
) -> None:
    result = cli(
        *("img", "--model-path", drawing_checkpoint, "--image", picture, "--prompt", "Make it blue", "--steps", 4),
        *("--num-images", 2, "--save-latent", "--output-dir", out),
    )
    assert result.code == 0, result.err
    manifest = only_manifest(out)
    assert len(manifest["output_images"]) == len(manifest["latent_paths"]) == 2
    assert manifest["decoder"]["files"]
    assert result.out.splitlines()[-4:] == [
        path for pair in zip(manifest["output_images"], manifest["latent_paths"], strict=True) for path in pair
    ]
    latent = torch.load(manifest["latent_path"], weights_only=True)
    assert np.array_equal(
        np.asarray(models["siglip"].decode([latent])[0]), np.asarray(Image.open(manifest["output_images"][0]))
    )


def test_a_question_is_not_answered_by_drawing(
    cli: Cli, drawing_checkpoint: Path, picture: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for --draw; a request is, but for --no-draw."""
    monkeypatch.setattr("scale_rae.pipeline.ScaleRAE.converse", _asks_for_an_image)
    for i, (prompt, flags, draws) in enumerate(
        [
            ("Is there a blue star?", [], False),
            ("Is there a blue star?", ["--draw"], True),
            ("Can you describe what's in this image?", [], False),
            ("Can you make it blue?", [], True),
            ("Make it blue", ["--no-draw"], False),
        ]
    ):
        result = cli(
            *("img", "--model-path", drawing_checkpoint, "--image", picture, "--prompt", prompt, "--steps", 2),
            *("--output-dir", out / str(i), *flags),
        )
        assert bool(only_manifest(out / str(i))["output_images"]) == draws, prompt
        assert result.code == (0 if draws else 1)
        if not draws:
            assert "began a picture instead of answering" in result.error
            assert "--draw" in result.error


def _asks_for_an_image(
    self: ScaleRAE, conversations: Sequence[Any], limits: object, listen: object, draw: bool
) -> list[Reply]:
    condition = torch.zeros(self.config.tokens, self.config.dit.condition_width, dtype=self.dtype)
    return [Reply([self.tokenizer.image_start], [0.0], [0.0], condition if draw else None) for _ in conversations]


def test_sampling_flags_reach_the_drawing(
    cli: Cli, drawing_checkpoint: Path, picture: Path, tmp_path: Path, out: Path
) -> None:
    """As `generate` takes them, to which each makes a difference."""
    model = ScaleRAE.from_pretrained(str(drawing_checkpoint), device="cpu")
    shown = model.encode([Image.open(picture)])[0]
    torch.save(shown, tmp_path / "shown.pt")

    def generated(**options: Any) -> torch.Tensor:
        return model.generate(["Make it blue"], latents=[shown], **options)[0].images[0].latent

    def drawn(command: tuple[object, ...], *flags: object) -> torch.Tensor:
        common = ("--model-path", drawing_checkpoint, "--prompt", "Make it blue", "--save-latent", "--json")
        (manifest,) = cli(*command, *common, "--output-dir", out, *flags).manifests
        latent = torch.load(manifest["latent_path"], weights_only=True)
        assert isinstance(latent, torch.Tensor)
        return latent

    image = ("img", "--image", picture)
    flags = ("--seed", 8, "--guidance-level", 3, "--guidance-interval", 0.3, 0.7, "--steps", 5, "--solver", "heun")
    options = {"seed": 8, "guidance": 3.0, "guidance_interval": (0.3, 0.7), "steps": 5, "solver": "heun"}
    wanted = generated(**options)
    assert torch.equal(drawn(image, *flags), wanted)
    assert torch.equal(drawn(("latent", "--action", "continue", "--latent", tmp_path / "shown.pt"), *flags), wanted)
    assert torch.equal(drawn(image, "--steps", 4), generated(steps=4))
    for left_out in (["seed"], ["guidance", "guidance_interval"], ["guidance_interval"], ["solver"]):
        assert not torch.equal(generated(**{k: v for k, v in options.items() if k not in left_out}), wanted), left_out
    assert not torch.equal(generated(**options | {"steps": 4}), wanted)


def test_an_empty_answer_is_said_to_be_one(cli: Cli, checkpoints: dict[str, Path], out: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    result = cli(
        *("img", "--model-path", checkpoints["siglip"], "--image", tmp_path / "red.png", "--prompt", LOOK),
        *("--max-new-tokens", 2, "--output-dir", out),
    )
    assert only_manifest(out)["output_text"].strip() == ""  # this checkpoint says only what is no character
    assert result.code == 0
    assert result.out == ""
    assert "nothing that can be printed" in result.err


def test_json(cli: Cli, checkpoints: dict[str, Path], picture: Path, out: Path) -> None:
    result = cli(
        *("img", "--model-path", checkpoints["webssl"], "--image", picture, "--prompt", LOOK, "--json"),
        *("--max-new-tokens", 3, "--output-dir", out),
    )
    assert result.manifests == [only_manifest(out)]


@pytest.mark.parametrize("kind", ["1x1", "cmyk", "palette", "sixteen", "exif", "grey"])
def test_unusual_images(cli: Cli, checkpoints: dict[str, Path], tmp_path: Path, out: Path, kind: str) -> None:
    path = tmp_path / ("i.jpg" if kind in ("cmyk", "exif") else "i.png")
    if kind == "1x1":
        Image.new("RGB", (1, 1), "red").save(path)
    elif kind == "cmyk":
        Image.new("CMYK", (30, 20), (0, 200, 200, 0)).save(path)
    elif kind == "palette":
        Image.new("P", (30, 20)).save(path, transparency=0)
    elif kind == "sixteen":
        Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(path)
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (30, 20), "red").save(path, exif=exif)
    else:
        Image.new("L", (30, 20), 99).save(path)
    result = cli(
        *("img", "--model-path", checkpoints["webssl"], "--image", path, "--prompt", LOOK),
        *("--max-new-tokens", 2, "--output-dir", out),
    )
    assert result.code == 0, result.err


def test_the_hash_of_a_pipe_is_of_what_it_gave(
    cli: Cli, checkpoints: dict[str, Path], picture: Path, tmp_path: Path, out: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(picture.read_bytes()), daemon=True)
    writer.start()
    result = cli(
        *("img", "--model-path", checkpoints["webssl"], "--image", pipe, "--prompt", LOOK),
        *("--max-new-tokens", 2, "--output-dir", out),
    )
    assert result.code == 0, result.err
    writer.join()
    assert only_manifest(out)["image_sha256"] == hashlib.sha256(picture.read_bytes()).hexdigest()


@pytest.mark.usefixtures("no_loading")
def test_images_that_are_none(cli: Cli, tmp_path: Path, out: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    for name, complaint in {
        "text.png": "not an image",
        "short.png": "damaged",
        "huge.png": "too large",
        "none.png": "no such image",
        ".": "is a folder",
        "float.tiff": "floating-point",
    }.items():
        result = cli("img", "--image", tmp_path / name, "--prompt", LOOK, "--output-dir", out)
        assert result.code == 1
        assert complaint in result.error
        assert left(out) == []


def test_wrong_usage(cli: Cli) -> None:
    assert cli("img", "--prompt", LOOK).code == 2
    assert cli("img", "--image", "x.png").code == 2
    assert cli("img").code == 2


@pytest.mark.usefixtures("no_loading")
def test_empty_question(cli: Cli, picture: Path) -> None:
    assert (
        cli("img", "--image", picture, "--prompt", "").error == "the prompt is empty; say what to draw, or what to ask"
    )


def test_same_latent_as_the_pipeline_reads(models: dict[str, ScaleRAE], picture: Path) -> None:
    golden = np.load(GOLDENS / "webssl.npz")["vision.features"]
    latent = models["webssl"].encode([load_image(picture)])[0].numpy()
    latent = latent if latent.shape == golden.shape else latent[::32]
    np.testing.assert_allclose(latent, golden, atol=2e-5 * np.abs(golden).max())
    json.dumps({"shape": list(latent.shape)})


@pytest.mark.usefixtures("no_loading")
def test_image_and_question_without_flags(cli: Cli, tmp_path: Path) -> None:
    for argv in (["none.png", "What?"], ["--image", "none.png", "What?"], ["none.png", "--prompt", "What?"]):
        assert cli("img", *argv).error == "none.png: no such image"
    for argv in ([], ["a.png"], ["--prompt", "What?"], ["a.png", "What", "is", "it"]):
        assert cli("img", *argv).code == 2
