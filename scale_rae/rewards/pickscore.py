"""The reward PickScore-v1 (Kirstain et al. 2023, arXiv:2305.01569): a CLIP ViT-H/14 trained on people's choices.

Files: config.json and model*.safetensors or pytorch_model*.bin of yuvalkirstain/PickScore_v1. Tokenizer and image processor lie
beside them or in a folder `processor` there; else those of the CLIP from which PickScore was trained are used
(laion/CLIP-ViT-H-14-laion2B-s32B-b79K), looked up like weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scale_rae.config import check_numbers
from scale_rae.encoder import LARGEST_IMAGE
from scale_rae.errors import ConfigError, counted, last_line
from scale_rae.hub import Source
from scale_rae.images import Picture
from scale_rae.jsonio import read_json
from scale_rae.rewards import parts

REPO, PROCESSOR_REPO = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PROCESSOR = "preprocessor_config.json"


class PickScore:
    """CLIP's logit of a picture and a text: cosine · exp(logit_scale)."""

    name = "pickscore"

    def __init__(self, model: parts.Host, path: str | None = None) -> None:
        """Finds and loads the weights.

        Raises:
            ConfigError, CheckpointError, HubError: as `load_reward` says.
        """
        self.source = parts.locate(model, self.name, REPO, "config.json and weights", path)
        folder = self.source.folder
        parts.require(folder, ("config.json",), self.name, REPO)
        self._residency = model.residency
        self.network = network = parts.load_clip(folder, ": not PickScore", model.dtype, self._residency.home)
        self._part = self._residency.keep(self.name, network, [network.text_model, network.vision_model])
        self.processor_source = _find_processor(model, folder)
        side = network.config.vision_config.image_size
        self._processor = _load_processor(self.processor_source.folder / PROCESSOR, side)
        self.tokenizer = parts.clip_tokenizer(self.processor_source.folder, network)
        self._device, self._dtype = model.device, model.dtype
        self._memory_errors = model.memory_errors

    @property
    def range(self) -> tuple[float, float]:
        """The scores of opposite and of equal embeddings."""
        scale = float(self.network.logit_scale.exp())
        return -scale, scale

    @property
    def operations(self) -> float:
        """Those of the vision tower for one picture."""
        return parts.operations(self.network.vision_model, self.network.config.vision_config)

    def identity(self) -> dict[str, Any]:
        """The reward's name, and the files or commits of weights, tokenizer and image processor."""
        return parts.identity(self.name, self.source, "processor", self.processor_source)

    @torch.inference_mode()
    def score(self, images: Sequence[Picture], prompt: str) -> list[float]:
        """Logits, about 20 for most pictures; the prompt is cut after 77 tokens."""
        ids = torch.tensor([self.tokenizer.encode(prompt).ids], device=self._device)  # [1, T], never padded
        with self._residency.use(self._part):
            text = self.network.get_text_features(input_ids=ids).pooler_output  # [1, D]
        scores: list[float] = []
        for batch in parts.batches(images):
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"].to(self._device, self._dtype)
            with (
                self._memory_errors(f"scoring {counted(len(batch), 'image')} at once"),
                self._residency.use(self._part),
            ):
                pictures = self.network.get_image_features(pixel_values=pixels).pooler_output  # [N, D]
            scores += (parts.similarity(pictures, text) * self.network.logit_scale.exp()).tolist()
        return parts.checked(scores, self.name)


def _find_processor(model: parts.Host, folder: Path) -> Source:
    for place in (folder, folder / "processor"):
        has_tokenizer = any((place / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        if (place / PROCESSOR).is_file() and has_tokenizer:
            return Source(place.name, place)
    return parts.locate_part(model, PickScore.name, PROCESSOR_REPO, "processor", PROCESSOR)


def _load_processor(path: Path, side: int) -> Any:
    """CLIP's image processor on Pillow, and so the same with or without torchvision."""
    from transformers import CLIPImageProcessorPil

    raw = read_json(path)
    check_numbers(raw, path, LARGEST_IMAGE)
    for key in ("image_processor_type", "feature_extractor_type", "processor_class"):
        raw.pop(key, None)
    try:
        processor = CLIPImageProcessorPil(**raw)
        shape = processor(images=[Image.new("RGB", (8, 6))], return_tensors="pt")["pixel_values"].shape
    except Exception as e:  # the library's many ways to refuse a value
        raise ConfigError(f"{path}: not a usable image processor config ({last_line(e)})") from e
    if tuple(shape[-2:]) != (side, side):
        raise ConfigError(
            f"{path}: makes images of {shape[-1]} x {shape[-2]} pixels, but the model reads {side} x {side}"
        )
    return processor
