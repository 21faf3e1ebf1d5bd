"""Stages `dit`, `solver20`, `fp8` and `official` of gpu.py: seconds per image of the whole velocity network."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.bench import Bench
from benchmarks.gpu_kernels import profile_stage
from benchmarks.made_up import DIT_NAME, made_config, made_dit
from scale_rae import flow
from scale_rae.footprint import flops as dit_flops
from scale_rae.options import DEFAULT_STEPS, SamplingOptions, Speed
from scale_rae.pipeline import ScaleRAE
from scale_rae.sampling import LatentSampler

OFFICIAL_DIT = 2.13  # seconds per image in the official implementation's DiT on one H200, float32
EVALUATIONS = DEFAULT_STEPS


def sampling(
    b: Bench,
    model: ScaleRAE | LatentSampler,
    stage: str,
    name: str,
    batch: int,
    options: SamplingOptions,
    target: str = "",
    repeat: int = 0,
    one_prompt: bool = False,
) -> float:
    """Seconds per image of `model.sample`, or of a sampler's `draw`: noise, all evaluations, latents back on the CPU.

    Each image has its own condition, unless all are of `one_prompt`.
    """
    if b.tiny:
        options = replace(options, steps=min(options.steps, 6))
    shape = (model.config.tokens, model.config.dit.condition_width)
    generator = torch.Generator().manual_seed(batch)
    conditions = [torch.randn(shape, generator=generator).to(b.device, b.dtype) for _ in range(batch)]
    conditions = conditions[:1] * batch if one_prompt else conditions
    seeds = list(range(batch))

    def draw() -> object:
        if isinstance(model, LatentSampler):
            return [latent.cpu() for latent in model.draw(conditions, seeds, options)]
        return model.sample(conditions, seeds, options, batch)

    first, seconds = b.seconds(draw, repeat or b.repeat)
    each = seconds / batch
    evaluations = len(flow.evaluation_times(options.solver, options.steps, 3.0))
    flops = dit_flops(model.config.dit) * evaluations
    more = {"first": first, "images_per_second": 1 / each, "batch": batch, "guidance": options.guidance}
    if options.guidance == 1.0 and not one_prompt:
        more["share"], more["share_sustained"] = flops / each / b.ceiling, flops / each / b.sustained
    if options.guidance == 1.0 and DIT_NAME["1.5b"] in name:
        more["times_official"] = OFFICIAL_DIT / each
    b.add(stage, name, each, "s/image", target, **more)
    return each


def dit_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Sampling at batch 1, 8 and 32, guidance 1.0 and 1.5; the most important rows first."""
    network = DIT_NAME[size]
    plain, guided_ = SamplingOptions(), SamplingOptions(guidance=1.5)
    if size == "7b":
        sampling(b, model, "dit", f"{network}, batch 8", 8, plain, "share ≥ 75 %", 2)
        sampling(b, model, "dit", f"{network}, batch 1", 1, plain, "", 2)
        sampling(b, model, "dit", f"{network}, batch 8, guidance 1.5", 8, guided_, "", 1)
        return
    b.add(
        "dit",
        f"{network}: one image of {EVALUATIONS} evaluations",
        dit_flops(model.config.dit) * EVALUATIONS / 1e12,
        "TFLOP",
    )
    eight = sampling(b, model, "dit", f"{network}, batch 8", 8, plain, "share ≥ 80 %, ≥ 18 x official")
    sampling(b, model, "dit", f"{network}, batch 1", 1, plain, "share ≥ 55 % (70 %), ≥ 13 x official")
    quantized_rows(b, "dit", size)
    guided_eight = sampling(b, model, "dit", f"{network}, batch 8, guidance 1.5", 8, guided_)
    b.add("dit", f"{network}, batch 8: guidance 1.5 over 1.0", guided_eight / eight, "×", "≤ 1.75")
    sampling(
        b, model, "dit", f"{network}, batch 32", 32, plain, "share ≥ 80 %, ≥ 18 x official", 1 if not b.tiny else 0
    )
    sampling(b, model, "dit", f"{network}, batch 8, of one prompt", 8, plain, one_prompt=True)
    sampling(b, model, "dit", f"{network}, batch 1, guidance 1.5", 1, guided_)
    sampling(b, model, "dit", f"{network}, batch 32, guidance 1.5", 32, guided_, "", 1)


# Kind, batches, and targets: images per second over bf16's. The most important rows first.
QUANTIZED = (
    ("fp8", (1, 8), ("≥ 1.5 x", "≥ 1.55 x")),
    ("int8", (8,), ("≥ 0.9 x",)),
    ("int8-products", (8,), ("≥ 1.3 x",)),
    ("nf4", (8, 1), ("", "")),
    ("int8", (1,), ("",)),
    ("int8-products", (1,), ("",)),
    ("fp8-storage", (8,), ("",)),
)


def quantized_rows(b: Bench, stage: str, size: str) -> None:
    """Sampling with each kind of quantised weights, each of a network of its own."""
    network, config = DIT_NAME[size], made_config(size)
    for kind, batches, targets in QUANTIZED:
        if b.tiny and kind != "int8":  # a tiny network's widths suit no other kind
            continue
        with b.reported(f"{stage}: {kind}"), torch.inference_mode():
            speed = Speed("on" if b.device.type == "cuda" else "off", kind)  # type: ignore[arg-type]
            sampler = LatentSampler(config, made_dit(size, b.device, b.dtype), None, speed)
            for batch, target in zip(batches, targets, strict=True):
                each = sampling(b, sampler, stage, f"{network} {kind}, batch {batch}", batch, SamplingOptions())
                add_over_bf16(b, stage, f"{network} {kind}", network, batch, each, target)
            del sampler
        b.release()


def add_over_bf16(b: Bench, stage: str, name: str, network: str, batch: int, each: float, target: str) -> None:
    """Records how many times as fast as in bfloat16 `each` seconds per image are, if bfloat16 was measured."""
    before = [r["value"] for r in b.figures if r["name"] == f"{network}, batch {batch}"]
    if before:
        b.add(stage, f"{name} over bf16, batch {batch}", before[0] / each, "×", target)


def fp8_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Sampling in float8. It replaces the weights in place, so nothing in bf16 can be measured on this model afterwards."""
    if b.device.type != "cuda":
        return
    network = DIT_NAME[size]
    model.release_memory()
    model = model.with_speed(Speed("on", "fp8"))
    b.release()
    for batch in (8, 32, 1) if size != "7b" else (8,):
        target = "≥ 1.55 x bf16 (1.8)" if batch > 1 else ""
        each = sampling(
            b, model, "fp8", f"{network} fp8, batch {batch}", batch, SamplingOptions(), target, 1 if batch == 32 else 0
        )
        add_over_bf16(b, "fp8", f"{network} fp8", network, batch, each, target)
    if size != "7b":
        profile_stage(b, model, size)
        sampling(b, model, "fp8", f"{network} fp8, batch 8, of one prompt", 8, SamplingOptions(), one_prompt=True)
    for steps in (12, 16, 20):
        options = SamplingOptions(steps=steps, solver="ab2")
        sampling(b, model, "fp8", f"{network} fp8, {steps} evaluations of ab2, batch 8", 8, options, "≥ 60 x official")


def solver_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Sampling in bf16 with fewer evaluations."""
    for steps in (12, 20):
        options = SamplingOptions(steps=steps, solver="ab2")
        sampling(b, model, "solver20", f"{DIT_NAME[size]}, {steps} evaluations of ab2, batch 8", 8, options)


def official(b: Bench, size: str) -> None:
    """The network as the official code runs it: plain, float32 with TF32 off, one image at a time."""
    dit = made_dit(size, b.device, torch.float32)
    config = made_config(size)
    x = torch.randn(1, config.channels, config.dit.side, config.dit.side, device=b.device)
    y = torch.randn(1, config.tokens, config.dit.condition_width, device=b.device)
    t = torch.full((1,), 0.5, device=b.device)

    def run() -> None:
        for _ in range(EVALUATIONS):
            dit(x, t, y)

    with torch.inference_mode():
        _, seconds = b.seconds(run, 1)
    b.add(
        "official",
        f"{DIT_NAME[size]}: float32, plain, batch 1 (the official code's DiT: {OFFICIAL_DIT} s)",
        seconds,
        "s/image",
    )
