from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scale_rae.pipeline import ScaleRAE
from tests.cli.conftest import Cli, left, only_manifest, with_defaults


@pytest.fixture(scope="session")
def latents(models: dict[str, ScaleRAE]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (models["siglip"].config.tokens, models["siglip"].config.channels)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


@pytest.fixture
def latent(cli: Cli, checkpoints: dict[str, Path], out: Path) -> Cli:
    """`latent` with the siglip checkpoint into `out`, unless it is given others."""
    defaults = {"--model-path": checkpoints["siglip"], "--steps": 4, "--output-dir": out}
    return lambda *argv: cli("latent", *with_defaults(argv, defaults))


@pytest.fixture
def files(latents: list[torch.Tensor], tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.pt" for name in "abc"]
    for path, value in zip(paths, latents, strict=True):
        torch.save(value, path)
    return paths


def test_decoding_saves_the_pixels_of_the_latent(
    latent: Cli, files: list[Path], latents: list[torch.Tensor], models: dict[str, ScaleRAE], out: Path
) -> None:
    result = latent("--latent", files[0], "--action", "decode")
    assert result.code == 0, result.err
    manifest = only_manifest(out)
    (path,) = manifest["output_images"]
    assert result.out == path + "\n"
    expected = np.asarray(models["siglip"].decode([latents[0]])[0])
    assert np.array_equal(np.asarray(Image.open(path)), expected)
    assert Image.open(path).text["latent"] == str(files[0])
    assert manifest["mode"] == "latent"
    assert manifest["action"] == "decode"
    assert manifest["input_latents"] == [str(files[0])]
    assert manifest["input_latents_sha256"] == [hashlib.sha256(files[0].read_bytes()).hexdigest()]
    assert manifest["decoder"]["files"]


def test_decode_what_t2i_saved(latent: Cli, cli: Cli, checkpoints: dict[str, Path], out: Path, tmp_path: Path) -> None:
    first = cli(
        *("t2i", "--model-path", checkpoints["siglip"], "--prompt", "Show me a cat", "--steps", 4, "--save-latent"),
        *("--output-dir", tmp_path / "drawn", "--json"),
    ).manifests[0]
    (again,) = latent("--latent", first["latent_path"], "--action", "decode", "--json").manifests
    images = [np.asarray(Image.open(m["output_images"][0])) for m in (first, again)]
    assert np.array_equal(*images)


@pytest.mark.parametrize("form", ["repeated", "glob", "both"])
def test_decode_several(latent: Cli, files: list[Path], out: Path, form: str) -> None:
    argv: list[object] = {
        "repeated": [a for f in files for a in ("--latent", f)],
        "glob": ["--latent", *files],
        "both": ["--latent", files[0], "--latent", *files[1:]],
    }[form]
    result = latent(*argv, "--action", "decode", "--save-latent")
    assert result.code == 0, result.err
    manifest = only_manifest(out)
    assert manifest["input_latents"] == [str(f) for f in files]
    assert [p[-7:] for p in manifest["output_images"]] == ["_00.png", "_01.png", "_02.png"]
    assert len(manifest["latent_paths"]) == 3
    assert len(left(out)) == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_latents_in_other_forms(latent: Cli, latents: list[torch.Tensor], tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(latents[0].to(dtype)[None], tmp_path / "other.pt")
    torch.save(latents[0].to(dtype).float(), tmp_path / "plain.pt")
    images = []
    for name in ("other.pt", "plain.pt"):
        (manifest,) = latent("--latent", tmp_path / name, "--action", "decode", "--json").manifests
        images.append(np.asarray(Image.open(manifest["output_images"][0])))
    assert np.array_equal(*images)


def test_a_question_is_answered_about_the_latent(
    latent: Cli, files: list[Path], latents: list[torch.Tensor], models: Any, out: Path
) -> None:
    result = latent("--latent", files[0], "--action", "qa", "--prompt", "What?", "--max-new-tokens-qa", 9)
    (answer,) = models["siglip"].answer("What?", latents=latents[0], max_new_tokens=9)
    assert result.code == 0
    assert result.out.strip() == answer.text.strip()
    manifest = only_manifest(out)
    assert manifest["action"] == "qa"
    assert manifest["output_text"] == answer.text
    assert manifest["max_new_tokens"] == 9
    assert "--max-new-tokens-qa" in result.err


def test_question_about_several(
    latent: Cli, files: list[Path], latents: list[torch.Tensor], models: Any, out: Path
) -> None:
    result = latent("--latent", *files, "--action", "qa", "--prompt", "What?", "--max-new-tokens-qa", 3, "--json")
    answers = models["siglip"].answer("What?", latents=latents, max_new_tokens=3)
    assert [m["output_text"] for m in result.manifests] == [a.text for a in answers]
    assert [m["input_latents"] for m in result.manifests] == [[str(f)] for f in files]
    assert len(left(out)) == 3


def test_a_question_is_never_answered_by_drawing(
    latent: Cli, drawing_checkpoint: Path, out: Path, tmp_path: Path
) -> None:
    """Which it would be, as `continue` shows."""
    model = ScaleRAE.from_pretrained(str(drawing_checkpoint), device="cpu")
    torch.save(model.encode([Image.new("RGB", (20, 20), "red")])[0], tmp_path / "red.pt")
    common = ("--model-path", drawing_checkpoint, "--prompt", "Make it blue", "--output-dir", out)
    asked = latent("--latent", tmp_path / "red.pt", "--action", "qa", *common, "--max-new-tokens-qa", 1)
    assert asked.code == 1
    assert asked.error == (
        "the model began a picture instead of answering, which was not drawn; put the question in other words, or have it "
        "drawn: --action continue"
    )
    assert only_manifest(out)["output_images"] == []
    assert len(left(out)) == 1
    several = latent("--latent", tmp_path / "red.pt", tmp_path / "red.pt", "--action", "qa", "--quiet", *common)
    assert "began a picture 2 of 2 times" in several.error
    assert latent("--latent", tmp_path / "red.pt", "--action", "continue", *common).code == 0
    assert list(out.glob("*.png"))


def test_continue_in_words(latent: Cli, files: list[Path], out: Path) -> None:
    result = latent("--latent", files[0], "--action", "continue", "--prompt", "Go on", "--max-new-tokens", 4)
    assert result.code == 0
    assert only_manifest(out)["output_images"] == []


def test_continue_with_an_image(latent: Cli, drawing_checkpoint: Path, out: Path, tmp_path: Path) -> None:
    model = ScaleRAE.from_pretrained(str(drawing_checkpoint), device="cpu")
    shown = model.encode([Image.new("RGB", (20, 20), "red")])[0]
    torch.save(shown, tmp_path / "red.pt")
    result = latent(
        *("--model-path", drawing_checkpoint, "--latent", tmp_path / "red.pt", "--action", "continue"),
        *("--prompt", "Make it blue", "--save-latent", "--seed", 3),
    )
    assert result.code == 0, result.err
    manifest = only_manifest(out)
    assert manifest["action"] == "continue"
    assert manifest["image_seeds"] == [3]
    drawn = model.generate(["Make it blue"], latents=[shown], seed=3, steps=4)[0].images[0]
    assert np.array_equal(np.asarray(Image.open(manifest["output_images"][0])), np.asarray(drawn.image))
    assert torch.equal(torch.load(manifest["latent_path"], weights_only=True), drawn.latent)
    assert manifest["output_images"][0] in result.out


class _Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.usefixtures("no_loading")
def test_files_that_are_no_latents(latent: Cli, files: list[Path], tmp_path: Path, out: Path) -> None:
    bad = tmp_path / "bad.pt"
    whole = files[0].read_bytes()
    contents: list[tuple[Any, str]] = [
        (b"hello", "not a file that torch.save wrote"),
        (b"", "not a file that torch.save wrote"),
        (whole[: len(whole) // 2], "damaged"),
        (_Runs(), "refused"),
        ({"latent": torch.zeros(2)}, "holds a dict, not a tensor"),
        (3, "holds a int, not a tensor"),
        (torch.zeros(4, 4).to_sparse(), "sparse"),
    ]
    for content, complaint in contents:
        bad.write_bytes(content) if isinstance(content, bytes) else torch.save(content, bad)
        result = latent("--latent", files[1], bad, "--action", "decode")
        assert result.code == 1
        assert str(bad) in result.error
        assert complaint in result.error
    assert not Path("ran").exists()
    assert "no such latent file" in latent("--latent", tmp_path / "none.pt", "--action", "decode").error
    assert "is a folder" in latent("--latent", tmp_path, "--action", "decode").error
    assert left(out) == []


def test_tensors_that_are_no_latents(
    latent: Cli, files: list[Path], latents: list[torch.Tensor], tmp_path: Path, out: Path
) -> None:
    bad = tmp_path / "bad.pt"
    value = latents[0]
    tensors = {
        "[1, 768]": torch.zeros(1, 768),
        "[2, 256, 768]": torch.stack([value, value]),
        "torch.int64": value.long(),
        "complex64": value.to(torch.complex64),
        "not finite": value.clone().index_fill_(0, torch.tensor([7]), float("nan")),
        "NaN or infinity": value.clone().index_fill_(0, torch.tensor([7]), float("inf")),
    }
    for complaint, tensor in tensors.items():
        torch.save(tensor, bad)
        result = latent("--latent", files[1], bad, "--action", "decode")
        assert result.code == 1
        assert result.error.startswith(f"{bad}: ")
        assert complaint in result.error
    assert left(out) == []


@pytest.mark.usefixtures("no_loading")
def test_wrong_usage(latent: Cli, files: list[Path]) -> None:
    for argv in (
        ["--action", "decode"],
        ["--latent", files[0]],
        ["--latent", files[0], "--action", "dance"],
        ["--latent", files[0], "--action", "qa"],
        ["--latent", files[0], "--action", "continue"],
        ["--latent", files[0], "--action", "decode", "--skip-decoder"],
        ["--latent", files[0], "--action", "decode", "--prompt", "What?"],
    ):
        result = latent(*argv)
        assert result.code == 2
        assert result.out == ""
    assert "--prompt" in latent("--latent", files[0], "--action", "qa").err
    assert latent("--latent", files[0], "--action", "qa", "--prompt", "").code == 1
