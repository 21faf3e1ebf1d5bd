"""The decoder of FLUX's VAE, for checkpoints aligned with it: latent [L, C] -> pixels (REFERENCE §8).

The network is diffusers' AutoencoderKL, which needs the extra `vae`; only its decoder is loaded.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae.checkpoint import TensorReader, fill
from scale_rae.config import library_fields
from scale_rae.errors import CheckpointError, ConfigError, first_line, need
from scale_rae.hub import weight_files
from scale_rae.jsonio import Fields, read_json

PATCH = 2  # latents of the VAE per token, along each edge
MEAN = STD = [0.5, 0.5, 0.5]  # pixels of the VAE are in [-1, 1]


class VaeDecoder(nn.Module):
    """latents [B, L, C] -> pixels [B, 3, H, W], -1 black and 1 white."""

    def __init__(self, vae: Any, scaling: float, shift: float) -> None:
        super().__init__()
        self.vae, self.scaling, self.shift = vae, scaling, shift

    def forward(self, latents: Tensor) -> Tensor:
        z = unfolded(latents) / self.scaling + self.shift
        return self.vae.decode(z.to(self.vae.dtype)).sample

    def image_size(self, tokens: int) -> int:
        """Pixels along each edge of the picture of L = `tokens`: every level of the VAE but the last doubles its latents' edge."""
        levels = len(self.vae.config.block_out_channels)
        return math.isqrt(tokens) * PATCH << (levels - 1)


def unfolded(latents: Tensor) -> Tensor:
    """[B, L, 4 c] -> [B, c, 2 √L, 2 √L]; a token's channels are (channel, row, column), as FLUX packs them."""
    side = math.isqrt(latents.shape[1])
    return F.pixel_shuffle(latents.transpose(1, 2).reshape(len(latents), -1, side, side), PATCH)


def load_vae(folder: Path, channels: int, dtype: torch.dtype, device: torch.device) -> VaeDecoder:
    """The decoder of the VAE in `folder`, in diffusers' layout, for latents of C = `channels`.

    Raises:
        MissingExtraError: when diffusers is not installed.
        ConfigError, CheckpointError: naming the file and what is wrong with it.
    """
    need("vae", f"{folder}: the VAE that makes this checkpoint's pixels", "diffusers")
    from diffusers import AutoencoderKL

    path = folder / "config.json"
    raw = read_json(path)
    fields = Fields(raw, path)
    fields.choice("_class_name", ("AutoencoderKL",), "AutoencoderKL")
    count = fields.get("latent_channels", int)
    if count * PATCH**2 != channels:
        raise fields.fail(
            "latent_channels",
            f"is {count}; the model's latents of {channels} channels (diffusion_model_channels) hold "
            f"{channels / PATCH**2:g} in each of {PATCH} x {PATCH} places",
        )
    scaling, shift = fields.number("scaling_factor"), fields.number("shift_factor")
    if scaling == 0:
        raise fields.fail("scaling_factor", "is 0; latents are divided by it")
    sizes = library_fields({name: value for name, value in raw.items() if not name.startswith("_")}, path)
    files = weight_files(folder)
    reader = TensorReader(files)
    for name in ("block_out_channels", "layers_per_block"):
        size = sizes.get(name)
        reader.check_depth(len(size) if isinstance(size, list) else size if isinstance(size, int) else 0, name, path)
    try:
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(sizes | {"use_quant_conv": False, "use_post_quant_conv": False})
    except Exception as e:  # the library's many ways to refuse a value
        raise ConfigError(f"{path}: not a usable VAE config ({first_line(e)})") from e
    del vae.encoder
    if any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in reader.tensors):
        raise CheckpointError(f"{files[0]}: has quant convolutions, which VAEs of 16 channels like FLUX's do without")
    fill({"": vae}, reader, dtype, device, ignore=lambda name: name.startswith("encoder."))
    return VaeDecoder(vae.eval(), scaling, shift)
