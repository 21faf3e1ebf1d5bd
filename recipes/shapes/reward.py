"""Stage 3: the encoder's image-text score, finetuned on prompts, so that it can rank drawings (`--reward siglip`).

In stage 1, the score was trained on full descriptions of pictures that have little in common. Here, each picture is compared with
texts that are true of it and texts with one thing changed. Only the text tower, the pooling head and the score's scale and bias are
trained, so the latents do not change for the pixel decoder and the language model.

Loss: binary cross-entropy of the score; true and false texts have the same weight.

    python -m recipes.shapes.reward --out runs/shapes
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.shapes import common, data, networks, pools
from recipes.shapes.decoder import frozen_encoder
from recipes.shapes.loop import Metrics, prepare_device, say, train_stage
from recipes.shapes.settings import CAPTION_TOKENS, Preset
from scale_rae.shapes import world
from scale_rae.training.optim import FlatModel

NOISE = 0.3  # as decoder.NOISE: pictures to be ranked are drawn ones


class Logit(nn.Module):
    """The score's scale (its logarithm) and bias."""

    def __init__(self, siglip: Any) -> None:
        super().__init__()
        self.scale, self.bias = siglip.logit_scale, siglip.logit_bias


def trained_parts(siglip: Any) -> dict[str, nn.Module]:
    """What this stage trains, by prefix of its parameters' names."""
    vision = siglip.vision_model
    return {
        "text_model.": siglip.text_model,
        "vision_model.post_layernorm.": vision.post_layernorm,
        "vision_model.head.": vision.head,
        "logit_": Logit(siglip),
    }


def scores(siglip: Any, latents: Tensor, ids: Tensor) -> Tensor:
    """Logits [B, K] of latents [B, L, C] and K texts for each, [B, K, CAPTION_TOKENS].

    The pooling head's layer norm sees in a latent what it sees in the hidden states that the latent is the layer norm of.
    """
    count = ids.shape[1]
    image = networks.pooled_image(siglip, latents)
    text = networks.pooled_text(siglip, ids.flatten(0, 1)).view(len(ids), count, -1)
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    cosine: Tensor = (image[:, None] * text).sum(-1)
    return cosine * siglip.logit_scale.exp() + siglip.logit_bias


class Loss:
    """Draws a batch from the pools and computes the stage's loss."""

    def __init__(self, siglip: Any, latents: Tensor, ids: Tensor, truth: Tensor, preset: Preset, batch: int) -> None:
        self.siglip, self.latents, self.ids, self.truth, self.batch = siglip, latents, ids, truth, batch
        self.preset = preset
        self.dtype = siglip.vision_model.head.probe.dtype

    def __call__(self) -> tuple[Tensor, Metrics]:
        rows = torch.randint(len(self.ids), (self.batch,), device=self.ids.device)
        latents = self.latents.index_select(0, rows).float().view(-1, self.preset.tokens, self.preset.channels)
        latents = networks.with_noise(latents, NOISE)
        ids = self.ids.index_select(0, rows).long().view(self.batch, data.MATCHES, CAPTION_TOKENS)
        truth = self.truth.index_select(0, rows).float()
        logits = scores(self.siglip, latents.to(self.dtype), ids)
        each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        loss = (each * truth).sum() / truth.sum() + (each * (1 - truth)).sum() / (1 - truth).sum()
        best = (logits - 1e9 * (1 - truth)).amax(1) > (logits - 1e9 * truth).amax(1)
        some = truth.amax(1)  # 0 where the picture is spoilt
        first = (best.float() * some).sum() / some.sum()
        return loss, {"right": ((logits > 0) == (truth > 0)).float().mean(), "true_first": first}


@torch.no_grad()
def measure(
    siglip: Any, words: common.Vocabulary, preset: Preset, device: torch.device, count: int
) -> dict[str, float]:
    """For each kind of prompt, how often a held-out scene's prompt scores above the same with one attribute changed."""
    rng = random.Random(4321)
    scenes = world.sample(np.random.default_rng(4321), count, world.KINDS, "only")
    true = [next(p for p in world.true_prompts(scene) if p.tag == scene.kind) for scene in scenes]
    false = [world.changed(rng, prompt, "any") for prompt in true]
    texts = [data.captions(words.encoder, [prompt.text for prompt in prompts]) for prompts in (true, false)]
    ids = torch.from_numpy(np.stack(texts, 1)).to(device).long()
    latents = pools.latent_pool(siglip, scenes, preset, device).float().view(count, preset.tokens, preset.channels)
    of: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, count, 512):
        logits = scores(siglip, latents[start : start + 512], ids[start : start + 512])
        for prompt, right in zip(true[start:], (logits[:, 0] > logits[:, 1]).tolist(), strict=False):
            of[prompt.tag].append(right)
    return {kind: float(np.mean(of[kind])) for kind in world.KINDS if of[kind]}


def main(argv: list[str] | None = None) -> bool:
    """Runs the stage; returns whether it is finished."""
    parser = common.parser(__doc__, steps=8_000, seconds=60, lr=1e-3, muon_lr=0.01, ema=0.998, decay=0.7, warmup=100)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--pool", type=int, default=500_000, help="scenes with their texts")
    args = parser.parse_args(argv)
    preset, folder = common.preset_of(args), args.out / "reward"
    words = common.vocabulary(args.out)
    start = time.perf_counter()
    chunk = data.make("match", args.pool, args.seed + 2, words.encoder, world.SCENE_KINDS, args.workers)
    say(f"{args.pool} scenes and texts: {time.perf_counter() - start:.1f} s")

    device, dtype = prepare_device(args.device)
    common.set_seed(args.seed)
    siglip = frozen_encoder(args, words, preset, device)
    latents = pools.latent_pool(siglip, chunk.scenes, preset, device, chunk.second)
    parts = trained_parts(siglip)
    for part in parts.values():
        part.requires_grad_(True)
    options = common.optimizer_options(args)
    model = FlatModel(parts, device, dtype, options, args.steps, keep_float32=lambda name: name.startswith("logit_"))
    compiled = [] if args.no_compile else list(siglip.text_model.encoder.layers)
    ids, truth = (torch.from_numpy(array).to(device) for array in (chunk.texts.ids, chunk.attributes))
    settings = common.fingerprint(preset, model.options, batch=args.batch, pool=args.pool, seed=args.seed)
    loss = Loss(siglip, latents, ids, truth, preset, args.batch)
    finished = train_stage(model, loss, args, folder, settings, compiled)
    if finished:
        before = common.load_weights(args.out / "encoder" / "encoder.safetensors")
        common.save_weights(folder / "encoder.safetensors", {**before, **model.tensors()})
        count = 64 if args.tiny else 2048
        for name, stage in (("before", "encoder"), ("after", "reward")):
            shipped = networks.build_encoder(words.encoder_config(preset))
            common.fill(shipped, common.load_weights(args.out / stage / "encoder.safetensors"))
            shares = measure(shipped.to(device).eval(), words, preset, device, count)
            listed = "  ".join(f"{kind} {share:.3f}" for kind, share in shares.items())
            say(f"true prompt above a changed one, {count} held-out scenes, {name}: {listed}")
    return finished


if __name__ == "__main__":
    main()
