"""Image -> latent [L, C] float32, by the representation encoder a checkpoint was trained on (REFERENCE §9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from scale_rae.checkpoint import TensorReader
from scale_rae.errors import CheckpointError, ConfigError, last_line
from scale_rae.hub import weight_files
from scale_rae.jsonio import read_json

SUPPORTED = ("siglip", "siglip_vision_model", "dinov2")
_NOT_VISION = ("text_model.", "logit_scale", "logit_bias", "classifier.")  # parts of an encoder's file we do not use


def resize_tokens(tokens: Tensor, count: int) -> Tensor:
    """Bilinear resize of a square token grid: [B, N, W] -> [B, count, W]."""
    if tokens.shape[1] == count:
        return tokens
    side, new_side = math.isqrt(tokens.shape[1]), math.isqrt(count)
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)  # [B, W, side, side]
    grid = F.interpolate(grid.float(), size=(new_side, new_side), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(tokens.dtype)


class Encoder:
    """A SigLIP or DINOv2 (WebSSL) vision model with its image processor.

    `channels` is C; `image_mean`, `image_std` are the processor's, which the pixel decoder undoes. The weights load when
    `model` is first used: drawing needs none of them.
    """

    def __init__(self, folder: Path, tokens: int, select_layer: int, dtype: torch.dtype, device: torch.device) -> None:
        """Loads from a local folder.

        Raises:
            ConfigError, CheckpointError: naming the file and what is wrong with it.
        """
        self.tokens, self.select_layer = tokens, select_layer
        self.dtype, self.device = dtype, device
        path = folder / "config.json"
        kind = read_json(path).get("model_type")
        if kind not in SUPPORTED:
            raise ConfigError(
                f"{path}: model_type {kind!r} is not a supported encoder (supported: {', '.join(SUPPORTED)})"
            )
        self.kind: str = kind
        self.processor, side = _load_processor(folder / "preprocessor_config.json", self.kind)
        self.image_mean: list[float] = [float(x) for x in self.processor.image_mean]
        self.image_std: list[float] = [float(x) for x in self.processor.image_std]
        self._folder = folder
        self._config = config = _vision_config(folder, self.kind)
        self.channels: int = config.hidden_size
        layers = config.num_hidden_layers
        if self.kind != "dinov2" and not -layers - 1 <= select_layer <= layers:
            raise ConfigError(f"{path}: mm_vision_select_layer {select_layer} of an encoder with {layers} layers")
        if self.kind == "dinov2" and side % config.patch_size:
            raise ConfigError(f"{path}: patch_size {config.patch_size} does not divide the {side} pixels of an image")
        if self.kind != "dinov2" and side != config.image_size:
            raise ConfigError(f"{path}: image_size is {config.image_size}, but preprocessor_config.json makes {side}")

    @cached_property
    def model(self) -> Any:
        """transformers' vision model.

        Raises:
            CheckpointError: naming the folder or file and what is wrong with the weights.
        """
        return _load_vision_model(self._folder, self.kind, self._config, self.dtype).to(self.device)

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


def _load_processor(path: Path, kind: str) -> tuple[Any, int]:
    """The image processor a preprocessor_config.json describes, on Pillow, and the side of the images it makes.

    Pillow's resize on every machine, with or without torchvision, so that an image means one latent. The classes are
    asked for by name: transformers' AutoImageProcessor wants torchvision in some versions even for these.
    """
    from transformers import BitImageProcessorPil, SiglipImageProcessorPil

    raw = read_json(path)
    classes: dict[str, Any] = {
        "SiglipImageProcessor": SiglipImageProcessorPil,
        "BitImageProcessor": BitImageProcessorPil,
    }
    default = "BitImageProcessor" if kind == "dinov2" else "SiglipImageProcessor"
    name = raw.pop("image_processor_type", None) or default
    cls = classes.get(name.removesuffix("Fast")) if isinstance(name, str) else None
    if cls is None:
        raise ConfigError(f"{path}: image_processor_type {name!r} is not supported (supported: {', '.join(classes)})")
    for field in ("image_mean", "image_std"):
        value = raw.get(field)
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in value)
            or (field == "image_std" and min(value) <= 0)
        ):
            raise ConfigError(f"{path}: {field} is {value!r}; must be three numbers")
    try:
        processor = cls(**raw)
        size = processor(images=[Image.new("RGB", (8, 6))], return_tensors="pt")["pixel_values"].shape[-2:]
    except Exception as e:  # the library's many ways to refuse a value
        raise ConfigError(f"{path}: not a usable image processor config ({last_line(e)})") from e
    if size[0] != size[1]:
        raise ConfigError(f"{path}: makes images of {size[1]} x {size[0]} pixels; they must be square")
    return processor, int(size[0])


def _vision_config(folder: Path, kind: str) -> Any:
    """transformers' config of the vision model that a folder's config.json describes."""
    from transformers import Dinov2Config, SiglipVisionConfig

    raw = read_json(folder / "config.json")
    vision = raw.get("vision_config") if kind == "siglip" else raw
    if not isinstance(vision, dict):
        raise ConfigError(f"{folder / 'config.json'}: vision_config is missing")
    try:
        return (Dinov2Config if kind == "dinov2" else SiglipVisionConfig)(**vision)
    except Exception as e:  # the library's many ways to refuse a config
        raise ConfigError(f"{folder / 'config.json'}: not a usable encoder config ({last_line(e)})") from e


def _load_vision_model(folder: Path, kind: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """Our reader reads the weights, so that what it refuses is refused here too; transformers knows where they go."""
    from transformers import Dinov2Model, SiglipVisionModel
    from transformers.utils import logging

    cls: Any = Dinov2Model if kind == "dinov2" else SiglipVisionModel
    reader = TensorReader(weight_files(folder))
    tensors = {}
    for name, stored in reader.tensors.items():
        if not name.startswith(_NOT_VISION) and not name.endswith("position_ids"):
            tensors[name] = torch.empty(stored.shape, dtype=dtype)
            reader.read_into(name, tensors[name])
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # we say what is wrong with the weights ourselves
    logging.disable_progress_bar()
    try:
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            attn_implementation="sdpa",
        )
    except Exception as e:  # sizes that make no network
        raise CheckpointError(f"{folder}: the encoder cannot be built ({last_line(e)})") from e
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    problems = []
    for key, what in (
        ("missing_keys", "missing tensors"),
        ("unexpected_keys", "unexpected tensors"),
        ("mismatched_keys", "wrong shapes"),
    ):
        if found := sorted(_describe(entry) for entry in info.get(key) or ()):
            problems.append(f"{what}: {', '.join(found)}")
    if problems:
        raise CheckpointError(f"{folder}: the encoder's weights have {'; '.join(problems)}")
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def _describe(entry: object) -> str:
    """A tensor's name or, of (name, stored shape, shape), what is wrong with it."""
    if isinstance(entry, tuple) and len(entry) == 3:
        return f"{entry[0]} is {list(entry[1])}, should be {list(entry[2])}"
    return str(entry)
