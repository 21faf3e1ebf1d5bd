"""FLUX-VAE-aligned checkpoints draw and decode through diffusers' AutoencoderKL, and do not pretend to read."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scale_rae.cli import main
from scale_rae.errors import CheckpointError, ConfigError, ScaleRAEError
from scale_rae.pipeline import ScaleRAE
from tests.helpers.made_checkpoints import golden_case, write_checkpoint

# It is imported by the tests that run: pytest's other processes collect them too.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs the extra `vae`")

DRAW = "Can you generate a photo of a cat on a windowsill?"
CHANNELS = 64  # 16 of the VAE's in 2 x 2 places


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up checkpoint that draws latents of 64 channels, with its encoder, and a small VAE in FLUX's layout."""
    case = copy.deepcopy(golden_case("siglip"))
    config, tensors = case["model"]["config"], case["model"]["tensors"]
    config |= {"generation_alignment_tower": "made-up/flux", "diffusion_model_channels": CHANNELS}
    tensors["diff_head.model.x_embedder.proj.weight"][1] = CHANNELS
    for part in ("weight", "bias"):
        tensors[f"diff_head.model.final_layer.linear.{part}"][0] = CHANNELS
    for name in [name for name in tensors if name.startswith("diff_head.data_")]:
        del tensors[name]
    folder = tmp_path_factory.mktemp("flux")
    model = write_checkpoint(case, folder)
    shutil.rmtree(folder / "decoder")
    torch.manual_seed(0)
    import diffusers

    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
    )
    vae.save_pretrained(model / "made-up" / "flux" / "vae")
    return model


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ScaleRAE:
    return ScaleRAE.from_pretrained(str(checkpoint), device="cpu")


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def vae_of(checkpoint: Path) -> Path:
    return checkpoint / "made-up" / "flux" / "vae"


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_pixels_are_those_of_diffusers(model: ScaleRAE, checkpoint: Path) -> None:
    from diffusers import AutoencoderKL, FluxPipeline
    from diffusers.image_processor import VaeImageProcessor

    side = int(model.config.tokens**0.5)
    latents = torch.randn(2, model.config.tokens, CHANNELS, generator=torch.Generator().manual_seed(1))
    vae = AutoencoderKL.from_pretrained(vae_of(checkpoint))
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    packed = FluxPipeline._unpack_latents(latents, 2 * side * scale, 2 * side * scale, scale)
    with torch.inference_mode():
        pixels = vae.decode(packed / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = VaeImageProcessor().postprocess(pixels, output_type="pil")
    decoded = model.decode(list(latents))
    assert {image.size for image in decoded} == {(model.image_size, model.image_size)}
    for ours, theirs in zip(decoded, expected, strict=True):
        assert ours.size == theirs.size == (2 * side * scale, 2 * side * scale)
        difference = np.asarray(ours).astype(int) - np.asarray(theirs)
        assert difference.min() >= -1  # they round, the published decoding truncates
        assert difference.max() <= 0
    assert np.asarray(decoded[0]).std() > 1
    assert not np.array_equal(decoded[0], decoded[1])


def test_draws_and_decodes_from_the_command_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = ["--model-path", str(checkpoint), "--device", "cpu", "--output-dir", str(out)]
    assert main(["t2i", "--prompt", DRAW, "--steps", "3", "--save-latent", *base]) == 0
    (latent,), (picture,) = out.glob("*_latent.pt"), out.glob("*.png")
    assert main(["latent", "--action", "decode", "--latent", str(latent), *base, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert np.array_equal(Image.open(picture), Image.open(manifest["output_images"][0]))
    assert sorted(manifest["decoder"]["files"]) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert manifest["encoder"] is None
    assert torch.load(latent, weights_only=True).shape[-1] == CHANNELS


@pytest.mark.parametrize(
    "arguments",
    [
        ["latent", "--action", "qa", "--prompt", "What is it?", "--latent", "LATENT"],
        ["latent", "--action", "continue", "--prompt", "Draw it again.", "--latent", "LATENT"],
        ["img", "--image", "IMAGE", "--prompt", "What is it?"],
        ["t2i", "--prompt", DRAW, "--post-qa-prompt", "Is it?"],
        ["scale", "t2i", "--metadata-file", "PROMPTS", "--reward", "none"],
    ],
    ids=["qa", "continue", "img", "post-qa", "scale"],
)
def test_reading_is_refused(
    model: ScaleRAE, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    files = {"LATENT": tmp_path / "a.pt", "IMAGE": tmp_path / "a.png", "PROMPTS": tmp_path / "prompts.jsonl"}
    torch.save(torch.zeros(model.config.tokens, CHANNELS), files["LATENT"])
    Image.new("RGB", (32, 32)).save(files["IMAGE"])
    files["PROMPTS"].write_text('{"prompt": "a cat"}\n')
    out = tmp_path / "out"
    command = [str(files.get(argument, argument)) for argument in arguments]
    command += ["--model-path", str(checkpoint), "--device", "cpu", "--output-dir", str(out)]
    assert main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(checkpoint / "config.json") in error
    assert "64 channels do not fit its language model" in error
    assert not list(out.rglob("*.png"))


def test_every_way_to_read_is_refused(model: ScaleRAE) -> None:
    latent, picture = torch.zeros(model.config.tokens, CHANNELS), Image.new("RGB", (8, 8))
    for read in (
        lambda: model.answer("What?", latents=latent),
        lambda: model.answer("What?", images=picture),
        lambda: model.encode([picture]),
        lambda: model.score([latent], "a cat"),
        lambda: model.generate("Again", latents=[latent]),
    ):
        with pytest.raises(ConfigError, match="do not fit its language model"):
            read()


def test_without_diffusers_the_extra_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    drawing = ScaleRAE.from_pretrained(str(checkpoint), device="cpu")
    with pytest.raises(ScaleRAEError, match=r'pip install "scale-rae\[vae\]"'):
        drawing.decode([torch.zeros(drawing.config.tokens, CHANNELS)])


@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_vae_with_the_model_comes_first(changed: Path, beside: bool) -> None:
    shutil.move(vae_of(changed), changed.parent / "vae" if beside else changed / "vae")
    loaded = ScaleRAE.from_pretrained(str(changed), device="cpu")
    assert loaded.decode([torch.zeros(loaded.config.tokens, CHANNELS)])
    assert loaded.decoder_source is not None
    assert loaded.decoder_source.own


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"latent_channels": 4}, "latent_channels is 4; the model's latents of 64 channels"),
        ({"latent_channels": None}, "latent_channels is missing"),
        ({"scaling_factor": None}, "scaling_factor is missing"),
        ({"shift_factor": float("nan")}, "shift_factor is nan"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name 'AutoencoderTiny' is not supported"),
        ({"up_block_types": ["NoSuchBlock"] * 3}, "not a usable VAE config"),
        ({"layers_per_block": 10**5}, "layers_per_block is 100000, but the weights hold only"),
        ({"block_out_channels": [32] * 10**4}, "block_out_channels is 10000, but the weights hold only"),
        ({"sample_size": 1 << 40}, "sample_size holds 1099511627776; at most"),
    ],
)
def test_a_wrong_vae_config_is_named(changed: Path, fields: dict[str, Any], says: str) -> None:
    change_json(vae_of(changed) / "config.json", **fields)
    loaded = ScaleRAE.from_pretrained(str(changed), device="cpu")
    with pytest.raises(ConfigError) as caught:
        _ = loaded.decoder
    assert str(caught.value).startswith(f"{vae_of(changed) / 'config.json'}: {says}")
    assert "\n" not in str(caught.value)


def test_wrong_vae_weights_are_named(changed: Path) -> None:
    path = vae_of(changed) / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}, path)
    with pytest.raises(CheckpointError, match="quant convolutions"):
        _ = ScaleRAE.from_pretrained(str(changed), device="cpu").decoder
    del weights["decoder.conv_in.bias"]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"missing tensors: decoder\.conv_in\.bias"):
        _ = ScaleRAE.from_pretrained(str(changed), device="cpu").decoder


def test_channels_must_fold(changed: Path) -> None:
    change_json(changed / "config.json", diffusion_model_channels=62)
    with pytest.raises(ConfigError, match="diffusion_model_channels is 62; with a generation_alignment_tower"):
        ScaleRAE.from_pretrained(str(changed), device="cpu")
