"""Stage 1: a SigLIP-style encoder, trained on captions, whose latents keep enough to draw the picture again.

Loss: sigmoid contrastive loss of pictures and full captions (Zhai et al. 2023; equal captions in a batch are all positives),
plus a pixel decoder's L1 + 4 L2 + 0.05 · contrastive, reading latents with noise of random strength so that they become smooth.

    python -m recipes.shapes.encoder --out runs/shapes
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.shapes import common, data, networks, pools
from recipes.shapes.common import Vocabulary
from recipes.shapes.loop import Metrics, prepare_device, say, train_stage
from recipes.shapes.settings import Preset
from scale_rae.decoder import PixelDecoder
from scale_rae.shapes import world
from scale_rae.training.optim import FlatModel

NOISE = 0.4  # largest standard deviation of the noise on the decoder's latents, whose own is 1
CONTRASTIVE = 0.05


def reconstruction_loss(decoder: PixelDecoder, latents: Tensor, pixels: Tensor, noise: float) -> tuple[Tensor, Metrics]:
    """L1 + 4 L2, in pixels from -1 to 1, of latents [B, L, C] with added noise of standard deviation U(0, noise)."""
    error = decoder(networks.with_noise(latents, noise)).float() - pixels
    l1, l2 = error.abs().mean(), error.square().mean()
    return l1 + 4 * l2, {"l1": l1, "psnr": -10 * torch.log10(l2 / 4)}


def contrastive_loss(image: Tensor, text: Tensor, caption: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss of embeddings [B, C] each; `caption` [B] numbers the texts, equal ones are positives."""
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    logits = image @ text.T * scale.exp() + bias
    sign = (caption[:, None] == caption[None]).float() * 2 - 1
    return -F.logsigmoid(sign * logits).sum(-1).mean()


def caption_numbers(ids: data.Ids) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A number [N] for each row of caption ids that is equal for equal rows (and for others with chance 2^-60)."""
    weights = np.random.default_rng(0).integers(1, 2**62, ids.shape[1]) | 1
    return (ids.astype(np.int64) * weights).sum(1)


class Loss:
    """Draws a batch from the pools and computes the stage's loss."""

    def __init__(
        self, siglip: Any, decoder: PixelDecoder, images: Tensor, captions: Tensor, numbers: Tensor, batch: int
    ) -> None:
        self.siglip, self.decoder, self.batch = siglip, decoder, batch
        self.images, self.captions, self.numbers = images, captions, numbers

    def __call__(self) -> tuple[Tensor, Metrics]:
        rows = torch.randint(len(self.images), (self.batch,), device=self.images.device)
        pixels = networks.normalised(self.images.index_select(0, rows))
        hidden = networks.image_tokens(self.siglip, pixels)
        loss, metrics = reconstruction_loss(self.decoder, networks.latent_of(hidden), pixels, NOISE)
        contrastive = contrastive_loss(
            networks.pooled_image(self.siglip, hidden),
            networks.pooled_text(self.siglip, self.captions.index_select(0, rows).long()),
            self.numbers.index_select(0, rows),
            self.siglip.logit_scale,
            self.siglip.logit_bias,
        )
        return loss + CONTRASTIVE * contrastive, {**metrics, "contrastive": contrastive}


@torch.no_grad()
def measure(siglip: nn.Module, decoder: PixelDecoder, preset: Preset, device: torch.device, count: int) -> float:
    """Mean PSNR in dB of encode -> decode on scenes with held-out pairs, without noise."""
    scenes = world.sample(np.random.default_rng(12345), count, world.SCENE_KINDS, "only")
    values = []
    for start in range(0, count, 512):
        images = pools.image_pool(scenes[start : start + 512], preset, device)
        pixels = networks.normalised(images)
        decoded = decoder(networks.latent_of(networks.image_tokens(siglip, pixels))).clamp(-1, 1)
        values.append(-10 * torch.log10((decoded - pixels).square().mean((1, 2, 3)) / 4))
    return float(torch.cat(values).mean())


def main(argv: list[str] | None = None) -> bool:
    """Runs the stage; returns whether it is finished."""
    parser = common.parser(__doc__, steps=12_000, seconds=130, lr=1.5e-3, muon_lr=0.02, ema=0.999, decay=0.5)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--pool", type=int, default=500_000, help="pictures drawn once and kept on the device")
    args = parser.parse_args(argv)
    preset, folder = common.preset_of(args), args.out / "encoder"
    words = common.vocabulary(args.out)
    start = time.perf_counter()
    chunk = data.make("encode", args.pool, args.seed, words.encoder, world.SCENE_KINDS, args.workers)
    say(f"{args.pool} scenes and captions: {time.perf_counter() - start:.1f} s")

    device, dtype = prepare_device(args.device)
    common.set_seed(args.seed)
    siglip, decoder = build(words, preset)
    model = FlatModel(
        {"encoder.": siglip, "decoder.": decoder},
        device,
        dtype,
        common.optimizer_options(args),
        args.steps,
        keep_float32=lambda name: name.startswith("encoder.logit_"),
    )
    start = time.perf_counter()
    images = pools.image_pool(chunk.scenes, preset, device)
    say(f"{args.pool} pictures, {images.nbytes / 1e9:.1f} GB: {time.perf_counter() - start:.1f} s")
    compiled = [] if args.no_compile else [*networks.encoder_layers(siglip), *decoder.decoder_layers]
    ids, numbers = chunk.texts.ids, caption_numbers(chunk.texts.ids)
    loss = Loss(
        siglip, decoder, images, torch.from_numpy(ids).to(device), torch.from_numpy(numbers).to(device), args.batch
    )
    settings = common.fingerprint(preset, model.options, batch=args.batch, pool=args.pool, seed=args.seed)
    finished = train_stage(model, loss, args, folder, settings, compiled)
    if finished:
        finish(model, folder, words, preset, device, 64 if args.tiny else 2048)
    return finished


def build(words: Vocabulary, preset: Preset) -> tuple[nn.Module, PixelDecoder]:
    """A fresh encoder and decoder."""
    return networks.build_encoder(words.encoder_config(preset)), networks.build_decoder(preset)


def finish(
    model: FlatModel, folder: Path, words: Vocabulary, preset: Preset, device: torch.device, scenes: int
) -> None:
    """Writes encoder.safetensors and decoder.safetensors (averaged, bfloat16) and says how well they do."""
    tensors = model.tensors()
    for part in ("encoder", "decoder"):
        common.save_weights(
            folder / f"{part}.safetensors",
            {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")},
        )
    siglip, decoder = build(words, preset)
    common.fill(siglip, common.load_weights(folder / "encoder.safetensors"))
    common.fill(decoder, common.load_weights(folder / "decoder.safetensors"))
    psnr = measure(siglip.to(device), decoder.to(device), preset, device, scenes)
    say(f"encode -> decode on {scenes} held-out scenes: {psnr:.2f} dB")
    assert math.isfinite(psnr)


if __name__ == "__main__":
    main()
