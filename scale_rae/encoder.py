"""Image -> latent [L, C] float32, by the representation encoder a checkpoint was trained on (REFERENCE §9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from scale_rae.config import read_json
from scale_rae.errors import CheckpointError, ConfigError

SUPPORTED = ("siglip", "siglip_vision_model", "dinov2")


def resize_tokens(tokens: Tensor, count: int) -> Tensor:
    """Bilinear resize of a square token grid: [B, N, W] -> [B, count, W]."""
    if tokens.shape[1] == count:
        return tokens
    side, new_side = math.isqrt(tokens.shape[1]), math.isqrt(count)
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))  # [B, W, side, side]
    grid = F.interpolate(grid.float(), size=(new_side, new_side), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(tokens.dtype)


class Encoder:
    """A SigLIP or DINOv2 (WebSSL) vision model with its image processor.

    `channels` is C; `image_mean`, `image_std` are the processor's, which the pixel decoder undoes.
    """

    def __init__(self, folder: Path, tokens: int, select_layer: int, dtype: torch.dtype, device: torch.device) -> None:
        """Loads from a local folder.

        Raises:
            ConfigError, CheckpointError: naming the file and what is wrong with it.
        """
        from transformers import AutoImageProcessor

        self.tokens, self.select_layer = tokens, select_layer
        self.dtype, self.device = dtype, device
        self.kind = read_json(folder / "config.json").get("model_type")
        if self.kind not in SUPPORTED:
            raise ConfigError(
                f"{folder / 'config.json'}: model_type {self.kind!r} is not a supported encoder ({', '.join(SUPPORTED)})"
            )
        read_json(folder / "preprocessor_config.json")  # a clear error before the library's
        self.model = _load_vision_model(folder, self.kind, dtype).to(device)
        # Pillow's resize on every machine, with or without torchvision, so that an image means one latent.
        self.processor: Any = AutoImageProcessor.from_pretrained(str(folder), backend="pil", local_files_only=True)
        self.image_mean: list[float] = list(self.processor.image_mean)
        self.image_std: list[float] = list(self.processor.image_std)
        self.channels: int = self.model.config.hidden_size

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised pixels [N, 3, H, W] float32 of RGB images."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [N, L, C] float32 of normalised pixels [N, 3, H, W]."""
        pixels = pixels.to(self.device, self.dtype)
        if self.kind == "dinov2":
            features = self.model(pixels).last_hidden_state[:, 1:]
            return resize_tokens(features, self.tokens).float()
        hidden = self.model(pixels, output_hidden_states=True).hidden_states[self.select_layer]
        features = resize_tokens(hidden, self.tokens).float()
        return F.layer_norm(features, features.shape[-1:], eps=1e-6)


def _load_vision_model(folder: Path, kind: str, dtype: torch.dtype) -> nn.Module:
    from transformers import Dinov2Model, SiglipVisionModel
    from transformers.utils import logging

    cls: Any = Dinov2Model if kind == "dinov2" else SiglipVisionModel
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists the text tower's weights as unexpected; we check for ourselves
    try:
        model, info = cls.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, local_files_only=True, attn_implementation="sdpa"
        )
    except Exception as e:  # OSError, SafetensorError, RuntimeError on shapes: the library's many ways to fail
        raise CheckpointError(f"{folder}: the encoder cannot be loaded ({_first_line(e)})") from e
    finally:
        logging.set_verbosity(verbosity)
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            names = sorted(str(name) for name in info[problem])
            raise CheckpointError(
                f"{folder}: the encoder's weights have {problem.replace('_keys', '')} tensors: {names}"
            )
    return model.eval()  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
