"""Pictures of the validation prompts during training: the same noise each time, on a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from scale_rae.checkpoint import writing
from scale_rae.decoder import PixelDecoder, to_uint8
from scale_rae.dit import DiT
from scale_rae.hub import find
from scale_rae.loading import find_decoder, load_decoder, load_encoder
from scale_rae.noise import image_seed
from scale_rae.quantization import Place
from scale_rae.sampling import NormStats
from scale_rae.training.drawing import draw_latents
from scale_rae.training.prepare import Model
from scale_rae.training.settings import TrainingOptions

FOLDER = "validation"
_THUMBNAIL, _FOOT, _GAP = 192, 18, 6


class Validation:
    """Draws the validation prompts and writes `validation/step-N.png`."""

    def __init__(
        self, options: TrainingOptions, model: Model, dit: DiT, norm_stats: NormStats | None, folder: Path
    ) -> None:
        """Loads the pixel decoder.

        Raises:
            ConfigError, CheckpointError, HubError: when it cannot be loaded.
        """
        self._options, self._model, self._dit, self._norm_stats, self._folder = options, model, dit, norm_stats, folder
        source = find(model.config.encoder_name, "encoder", model.source.folder)
        encoder = load_encoder(source, model.config, model.dtype, model.device)
        self._mean, self._std = encoder.image_mean, encoder.image_std
        files = find_decoder(None, model.source, model.config, lambda: encoder.kind)
        decoder = load_decoder(files, model.config, Place(model.device, model.device, model.dtype))
        assert isinstance(decoder, PixelDecoder)  # models with a VAE are not trained
        self._decoder = decoder

    @torch.no_grad()
    def __call__(self, step: int, conditions: Sequence[Tensor]) -> Path:
        """The path of the sheet of a step, once it is written; `conditions` [L, Z] are those of the prompts."""
        options, images = self._options, []
        for number, condition in enumerate(conditions):
            seeds = [image_seed(options.seed, number, j) for j in range(options.num_validation_images)]
            given = condition.expand(len(seeds), -1, -1)
            how = seeds, options.validation_guidance, options.num_inference_steps
            latents = draw_latents(self._dit, self._model.config, self._norm_stats, given, *how)
            pixels = to_uint8(self._decoder(latents.to(self._model.dtype)), self._mean, self._std)
            images.append([Image.fromarray(array) for array in pixels.cpu().numpy()])
        path = self._folder / FOLDER / f"step-{step:06}.png"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(images, options.validation_prompts).save(path)
        return path


def contact_sheet(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Pictures in rows, each row below its caption."""
    columns = max(len(row) for row in rows)
    width = columns * (_THUMBNAIL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, len(rows) * (_FOOT + _THUMBNAIL + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = _GAP + i * (_FOOT + _THUMBNAIL + _GAP)
        line = " ".join(caption.split())
        text = line.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
        while text and pen.textlength(text) > width - 2 * _GAP:
            text = text[:-1]
        pen.text((_GAP, top), text, fill="black")
        for j, image in enumerate(row):
            sheet.paste(image.resize((_THUMBNAIL, _THUMBNAIL)), (_GAP + j * (_THUMBNAIL + _GAP), top + _FOOT))
    return sheet
