"""Stage 2: the pixel decoder, finetuned on the latents of the frozen encoder as it ships (bfloat16 weights).

python -m recipes.shapes.decoder --out runs/shapes
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from recipes.shapes import common, data, encoder, networks, pools
from recipes.shapes.common import Vocabulary
from recipes.shapes.loop import Metrics, prepare_device, say, train_stage
from recipes.shapes.settings import Preset
from scale_rae.decoder import PixelDecoder
from scale_rae.shapes import world
from scale_rae.training.optim import FlatModel

NOISE = 0.3  # as encoder.NOISE; generated latents are off by something like this


class Loss:
    """Draws a batch of latents and pictures and computes the reconstruction loss."""

    def __init__(self, decoder: PixelDecoder, images: Tensor, latents: Tensor, preset: Preset, batch: int) -> None:
        self.decoder, self.images, self.latents, self.batch = decoder, images, latents, batch
        self.shape = (batch, preset.tokens, preset.channels)

    def __call__(self) -> tuple[Tensor, Metrics]:
        rows = torch.randint(len(self.images), (self.batch,), device=self.images.device)
        pixels = networks.normalised(self.images.index_select(0, rows))
        latents = self.latents.index_select(0, rows).float().view(self.shape)
        return encoder.reconstruction_loss(self.decoder, latents, pixels, NOISE)


def frozen_encoder(args: Any, words: Vocabulary, preset: Preset, device: torch.device) -> Any:
    """The encoder that stage 1 made, with the bfloat16 weights it ships with, computing in float32."""
    siglip = networks.build_encoder(words.encoder_config(preset))
    common.fill(siglip, common.load_weights(args.out / "encoder" / "encoder.safetensors"))
    return siglip.requires_grad_(False).eval().to(device)


def main(argv: list[str] | None = None) -> bool:
    """Runs the stage; returns whether it is finished."""
    parser = common.parser(__doc__, steps=6_000, seconds=45, lr=5e-4, muon_lr=0.005, ema=0.998, decay=0.8, warmup=100)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--pool", type=int, default=300_000, help="pictures drawn once and kept on the device")
    args = parser.parse_args(argv)
    preset, folder = common.preset_of(args), args.out / "decoder"
    words = common.vocabulary(args.out)
    # Other scenes than the encoder's.
    chunk = data.make("encode", args.pool, args.seed + 1, words.encoder, world.SCENE_KINDS, args.workers)

    device, dtype = prepare_device(args.device)
    common.set_seed(args.seed)
    siglip = frozen_encoder(args, words, preset, device)
    start = time.perf_counter()
    images = pools.image_pool(chunk.scenes, preset, device)
    latents = pools.latents_of_images(siglip, images)
    say(f"{args.pool} pictures and latents: {time.perf_counter() - start:.1f} s")

    network = networks.build_decoder(preset)
    common.fill(network, common.load_weights(args.out / "encoder" / "decoder.safetensors"))
    model = FlatModel({"": network}, device, dtype, common.optimizer_options(args), args.steps)
    compiled = [] if args.no_compile else list(network.decoder_layers)
    settings = common.fingerprint(preset, model.options, batch=args.batch, pool=args.pool, seed=args.seed)
    loss = Loss(network, images, latents, preset, args.batch)
    finished = train_stage(model, loss, args, folder, settings, compiled)
    if finished:
        common.save_weights(folder / "decoder.safetensors", model.tensors())
        shipped = networks.build_decoder(preset)
        common.fill(shipped, common.load_weights(folder / "decoder.safetensors"))
        count = 64 if args.tiny else 2048
        psnr = encoder.measure(siglip, shipped.to(device), preset, device, count)
        say(f"encode -> decode on {count} held-out scenes: {psnr:.2f} dB")
    return finished


if __name__ == "__main__":
    main()
