"""GenEval's colour of an object: zero-shot classification by OpenAI's CLIP ViT-L/14.

For a class, each of ten colours has a column: the mean of three captions' embeddings. A crop gets the colour whose column has the
highest cosine with the crop's embedding. Everything is computed in float32; the original multiplies matrices in float16 under CUDA
autocast, so near ties can differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from scale_rae.errors import InputError
from scale_rae.geneval.published import CLIP
from scale_rae.geneval.verdicts import COLORS
from scale_rae.hub import find
from scale_rae.memory import MemoryErrors, exact_convolutions, in_batches, pick_device
from scale_rae.rewards.parts import clip_pixels, clip_tokenizer, load_clip

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BATCH = 16  # crops
_WHAT = "colour classifier"


def color_columns(network: Any, token_ids: Tensor) -> Tensor:
    """A class's classifier [D, colours] from its captions' ids [colours, templates, T].

    `network` is transformers' CLIPModel. Every caption ends with the tokenizer's highest id; what follows it does not matter.
    """
    colors, templates, _ = token_ids.shape
    output = network.get_text_features(input_ids=token_ids.flatten(0, 1))
    features = output.pooler_output.float()  # [colours · templates, D]
    embeddings = F.normalize(features, dim=-1).view(colors, templates, -1)
    return F.normalize(embeddings.mean(dim=1), dim=-1).T


def embeddings(network: Any, pixels: Tensor) -> Tensor:
    """Normalised embeddings [N, D] of pictures [N, 3, S, S] as `clip_pixels` makes them."""
    return F.normalize(network.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)


class ColorClassifier:
    """CLIP, and a cache of classes' classifiers."""

    def __init__(self, path: str = CLIP, device: str | None = None) -> None:
        """Finds and loads CLIP's weights from a folder or hub id, in float32.

        Raises:
            ConfigError, CheckpointError, HubError: files are missing or damaged, or are not those of a CLIP.
        """
        self.source = find(path, _WHAT)
        self.device = pick_device(device)
        problem = f"; colours need CLIP, as {CLIP}"
        self.network = load_clip(self.source.folder, problem, torch.float32, self.device)
        self.tokenizer = clip_tokenizer(self.source.folder, self.network)
        self._columns: dict[str, Tensor] = {}

    def classify_colors(self, images: Sequence[Image.Image], class_name: str) -> list[str]:
        """The colour of each crop, one of COLORS; all crops show objects of one class.

        Raises:
            InputError: a crop has no pixels.
            DeviceError: memory runs out.
        """
        return self.classify(images, [class_name] * len(images))

    def classify(self, images: Sequence[Image.Image], class_names: Sequence[str]) -> list[str]:
        """The colour of each crop, with one class per crop; crops of many pictures share batches.

        Raises:
            InputError: a crop has no pixels.
            DeviceError: memory runs out.
        """
        return [COLORS[int(row.argmax())] for row in self.logits(images, class_names)]

    @torch.inference_mode()
    def logits(self, images: Sequence[Image.Image], class_names: Sequence[str]) -> list[NDArray[np.float32]]:
        """The logits [10] of each crop's colours: 100 · cosine of its embedding and the columns of its class.

        Raises:
            InputError: a crop has no pixels.
        """
        if empty := next((image for image in images if not min(image.size)), None):
            raise InputError(f"a crop of {empty.width} x {empty.height} pixels has no colour")
        side = self.network.config.vision_config.image_size

        def run(start: int, stop: int) -> list[NDArray[np.float32]]:
            pixels = np.stack([clip_pixels(image, side) for image in images[start:stop]])
            with exact_convolutions():
                crops = embeddings(self.network, torch.from_numpy(pixels).to(self.device))  # [N, D]
            columns = torch.stack([self.columns(name) for name in class_names[start:stop]])  # [N, D, 10]
            return list(((100 * crops)[:, None] @ columns)[:, 0].cpu().numpy())

        def errors(what: str, remedy: str) -> MemoryErrors:
            return MemoryErrors(self.device, None, what, remedy)

        release = torch.cuda.empty_cache if self.device.type == "cuda" else None
        return in_batches(len(images), BATCH, run, errors, "classifying the colours of", "crop", release=release)

    @torch.inference_mode()
    def columns(self, class_name: str) -> Tensor:
        """The classifier [D, 10] of a class, which is computed once."""
        if class_name not in self._columns:
            captions = [t.format(color=color, name=class_name) for color in COLORS for t in TEMPLATES]
            ids = [self.tokenizer.encode(caption).ids for caption in captions]
            longest = max(map(len, ids))
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self.device)
            self._columns[class_name] = color_columns(self.network, padded.view(len(COLORS), len(TEMPLATES), longest))
        return self._columns[class_name]
