"""Stages `memory`, `t2i`, `decode` and `load` of gpu.py: a whole model, from loading to pictures."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.made_up import prompt_that_draws, write_checkpoint
from scale_rae.options import Speed
from scale_rae.outputs import png_bytes
from scale_rae.pipeline import ScaleRAE


def memory_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Peak memory that the allocator reserves while one prompt is drawn and decoded, at batch 1, then 8."""
    if b.device.type != "cuda":
        return
    prompt = prompt_that_draws(model, 10)
    model.release_memory()
    for batch, target in ((1, "≤ 12"), (8, "≤ 16")):
        b.peak_gib(reset=True)
        model.generate(prompt, num_images=batch, steps=4, batch_size=batch)
        b.add("memory", f"{size}: peak memory, batch {batch}", b.peak_gib(), "GiB", target if size != "7b" else "")


def t2i_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """From a 40-token prompt to a PIL image: all of `generate`."""
    prompt = prompt_that_draws(model, 10)
    results: list[Any] = []
    ways = [("", "≤ 0.30", model)]
    if model.speed.compile == "on":
        ways.append((", captured, not compiled", "", model.with_speed(Speed("off"))))
    for mode, goal, model in ways:
        first, seconds = b.seconds(partial(lambda model: results.append(model.generate(prompt)), model))
        assert len(results[-1].images) == 1
        stages = {k: round(v, 4) for k, v in results[-1].seconds.items()}
        name = f"{size}: end to end, warm, {len(results[-1].reply.ids)}-token reply{mode}"
        b.add("t2i", name, seconds, "s", goal, first=first, stages=stages)
        print(f"          {stages}", flush=True)


def decode_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Latents to PIL images, and those to PNG."""
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn(model.config.tokens, model.config.channels, generator=generator) for _ in range(32)]
    for batch in (1, 8, 32):
        first, seconds = b.seconds(partial(model.decode, latents[:batch], batch))
        b.add("decode", f"{size}: latents to images, batch {batch}", seconds / batch, "s/image", first=first)
    pictures = model.decode(latents[:8])
    _, seconds = b.seconds(lambda: [png_bytes(p, {}) for p in pictures])
    b.add("decode", f"{size}: PNG encoding, one thread", seconds / 8, "s/image")


def load_stage(b: Bench, size: str) -> None:
    """Loads a checkpoint in the published layout (model, decoder, encoder) from the page cache, then encodes images."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_checkpoint(size, Path(temporary), b.device)
        print("          written", flush=True)
        models: list[ScaleRAE] = []

        def load() -> None:
            models.clear()
            b.release()
            dtype = str(b.dtype).removeprefix("torch.")
            models.append(ScaleRAE.from_pretrained(str(folder), device=str(b.device), dtype=dtype))
            _ = models[0].encoder.model, models[0].decoder

        b.peak_gib(reset=True)
        first, seconds = b.seconds(load, 1)
        name = f"{size}: bf16 model, decoder and encoder from page cache"
        b.add("load", name, seconds, "s", "≤ 15", first=first, peak_gib=b.peak_gib())
    (model,) = models
    pictures = model.decode([torch.randn(model.config.tokens, model.config.channels) for _ in range(8)])
    pixels = model.encoder.preprocess(pictures)
    _, seconds = b.seconds(lambda: model.encoder.encode(pixels))
    b.add("load", f"{size}: images to latents, batch 8, without preprocessing", seconds / 8, "s/image")
    _, seconds = b.seconds(lambda: model.encode(pictures))
    b.add("load", f"{size}: images to latents, batch 8", seconds / 8, "s/image")
