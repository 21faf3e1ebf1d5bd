"""The image encoder (SigLIP or DINOv2) that a checkpoint was trained on: image -> latent [L, C] float32 (REFERENCE §9)."""

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
from scale_rae.config import NOT_VISION, VisionConfig, check_numbers, encoder_kind, parse_vision_config
from scale_rae.errors import CheckpointError, ConfigError, last_line
from scale_rae.hub import import_hub, weight_files
from scale_rae.jsonio import read_json, shortened
from scale_rae.residency import Residency

LARGEST_IMAGE = 2048  # pixels along an edge; also the limit for any number in a preprocessor's config


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

    def __init__(
        self,
        folder: Path,
        tokens: int,
        select_layer: int,
        dtype: torch.dtype,
        device: torch.device,
        residency: Residency | None = None,
    ) -> None:
        """Loads from a local folder. `residency` takes the weights once they are loaded.

        Raises:
            ConfigError, CheckpointError: naming the file and what is wrong with it.
        """
        self.tokens, self.select_layer = tokens, select_layer
        self.dtype, self.device = dtype, device
        self._residency = residency or Residency("none", device)
        path = folder / "config.json"
        raw = read_json(path)
        self.kind = encoder_kind(raw, path)
        self._folder = folder
        self._preprocessor = _read_preprocessor(folder / "preprocessor_config.json")
        self.image_mean: list[float] = [float(x) for x in self._preprocessor["image_mean"]]
        self.image_std: list[float] = [float(x) for x in self._preprocessor["image_std"]]
        side = _plain_side(self._preprocessor, self.kind)
        if side is None:  # an unusual preprocessor: its side is found by running it
            side = self._processor_and_side[1]
        self._config = config = parse_vision_config(raw, path)
        self.channels: int = config.width
        layers = config.layers
        if self.kind != "dinov2" and not -layers - 1 <= select_layer <= layers:
            raise ConfigError(f"{path}: mm_vision_select_layer {select_layer} of an encoder with {layers} layers")
        if self.kind == "dinov2" and side % config.patch:
            raise ConfigError(f"{path}: patch_size {config.patch} does not divide the {side} pixels of an image")
        if self.kind != "dinov2" and side != config.image:
            raise ConfigError(f"{path}: image_size is {config.image}, but preprocessor_config.json makes {side}")

    @cached_property
    def _processor_and_side(self) -> tuple[Any, int]:
        return _load_processor(self._preprocessor, self._folder / "preprocessor_config.json", self.kind)

    @property
    def processor(self) -> Any:
        """transformers' image processor."""
        return self._processor_and_side[0]

    @property
    def stretches(self) -> bool:
        """Whether pictures that are not square are stretched, and not cropped."""
        return not getattr(self.processor, "do_center_crop", False)

    @cached_property
    def model(self) -> Any:
        """transformers' vision model.

        Raises:
            CheckpointError: naming the folder or file and what is wrong with the weights.
        """
        with self._residency.lock:
            if "model" in self.__dict__:  # another thread has loaded it meanwhile
                return self.__dict__["model"]
            with torch.inference_mode(False):
                model = _load_vision_model(self._folder, self.kind, self._config, self.dtype).to(self._residency.home)
            self._residency.keep("encoder", model, [model])
            self.__dict__["model"] = model
            return model

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised pixels [N, 3, H, W] float32 of RGB images."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]

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


def _read_preprocessor(path: Path) -> dict[str, Any]:
    """A preprocessor_config.json whose mean and deviation are three numbers each, and whose sizes are bounded."""
    raw = read_json(path)
    for field in ("image_mean", "image_std"):
        value = raw.get(field)
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in value)
            or (field == "image_std" and min(value) <= 0)
        ):
            raise ConfigError(f"{path}: {field} is {shortened(value)}; must be three numbers")
    check_numbers(raw, path, LARGEST_IMAGE)
    return raw


_PLAIN = {"do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"}  # what published files ask for
_PLAIN_FIELDS = _PLAIN | {
    "image_processor_type",
    "image_mean",
    "image_std",
    "size",
    "crop_size",
    "resample",
    "rescale_factor",
}


def _published_processor(kind: str) -> str:
    """The class of published preprocessors of this kind of encoder."""
    return "BitImageProcessor" if kind == "dinov2" else "SiglipImageProcessor"


def _plain_side(raw: dict[str, Any], kind: str) -> int | None:
    """The side of the images that a preprocessor of the published form makes; None for one of another form.

    Drawing needs only this number, and importing transformers' image processors takes a second.
    """
    published = _published_processor(kind)
    name = raw.get("image_processor_type", published)
    if not isinstance(name, str) or name.removesuffix("Fast") != published or not raw.keys() <= _PLAIN_FIELDS:
        return None
    if not all(raw.get(field, True) is True for field in _PLAIN):
        return None
    if raw.get("resample", 3) not in range(6) or type(raw.get("rescale_factor", 0.0)) is not float:
        return None
    size = raw.get("size")
    if kind == "dinov2":  # the shorter edge becomes `size`, then the middle is cut out
        shortest = size.get("shortest_edge") if isinstance(size, dict) and len(size) == 1 else None
        size = raw.get("crop_size") if type(shortest) is int and shortest > 0 else None
    side = size.get("height") if isinstance(size, dict) else None
    return side if type(side) is int and side > 0 and size == {"height": side, "width": side} else None


def _load_processor(raw: dict[str, Any], path: Path, kind: str) -> tuple[Any, int]:
    """The image processor of a preprocessor_config.json, on Pillow, and the side of the images it makes.

    Pillow resizes on every machine, with or without torchvision, so an image has the same latent everywhere. The classes are
    chosen by name, because some versions of transformers' AutoImageProcessor require torchvision even for these.
    """
    import_hub()
    from transformers import BitImageProcessorPil, SiglipImageProcessorPil

    raw = dict(raw)
    classes: dict[str, Any] = {
        "SiglipImageProcessor": SiglipImageProcessorPil,
        "BitImageProcessor": BitImageProcessorPil,
    }
    name = raw.pop("image_processor_type", None) or _published_processor(kind)
    cls = classes.get(name.removesuffix("Fast")) if isinstance(name, str) else None
    if cls is None:
        raise ConfigError(f"{path}: image_processor_type {name!r} is not supported (supported: {', '.join(classes)})")
    try:
        processor = cls(**raw)
        size = processor(images=[Image.new("RGB", (8, 6))], return_tensors="pt")["pixel_values"].shape[-2:]
    except Exception as e:  # the library's many ways to refuse a value
        raise ConfigError(f"{path}: not a usable image processor config ({last_line(e)})") from e
    if size[0] != size[1]:
        raise ConfigError(f"{path}: makes images of {size[1]} x {size[0]} pixels; they must be square")
    return processor, int(size[0])


def _load_vision_model(folder: Path, kind: str, sizes: VisionConfig, dtype: torch.dtype) -> nn.Module:
    """transformers builds the network and knows the parameters' names; our reader reads the weights, with its checks."""
    import_hub()
    from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel
    from transformers.utils import logging

    cls: Any = Dinov2Model if kind == "dinov2" else SiglipVisionModel
    try:
        config = (Dinov2Config if kind == "dinov2" else SiglipVisionConfig)(**sizes.fields)
    except Exception as e:  # the library's many ways to refuse a config
        raise ConfigError(f"{folder / 'config.json'}: not a usable encoder config ({last_line(e)})") from e
    reader = TensorReader(weight_files(folder))
    reader.check_depth(sizes.layers, "num_hidden_layers", folder / "config.json")
    names = [n for n in reader.tensors if not n.startswith(NOT_VISION) and not n.endswith("position_ids")]
    reader.check_floats(names)
    tensors = {}
    for name in names:
        tensors[name] = torch.empty(reader.tensors[name].shape, dtype=dtype)
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
    return model.requires_grad_(False).eval()


def _describe(entry: object) -> str:
    """A tensor's name or, of (name, stored shape, shape), what is wrong with it."""
    if isinstance(entry, tuple) and len(entry) == 3:
        return f"{entry[0]} is {list(entry[1])}, should be {list(entry[2])}"
    return str(entry)
