"""Stage `profile` of gpu.py: which kernels the GPU spends its time in, and how long it is busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.made_up import prompt_of
from scale_rae import flow
from scale_rae.language import Conversation, Reply
from scale_rae.options import SamplingOptions, Speed
from scale_rae.pipeline import ScaleRAE


def profiled(run: Callable[[], object]) -> tuple[Any, float]:
    """The profiler of one run, with the GPU's events, and wall seconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    return profiler, wall


def busy_seconds(run: Callable[[], object]) -> float:
    """Seconds in which the GPU ran a kernel. Divide by the seconds of another run: profiling slows the host down."""
    profiler, _ = profiled(run)
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if "CUDA" in str(e.device_type))
    busy = reached = 0.0
    for start_us, end_us in spans:  # kernels on two streams at the same time count once
        busy += max(0.0, end_us - max(start_us, reached))
        reached = max(reached, end_us)
    return busy / 1e6


def kernel_table(b: Bench, name: str, run: Callable[[], object], parts: int = 1, most: int = 16) -> None:
    """Prints the kernels in which the GPU spends most time, per part of a run of `parts` equal parts."""
    if b.device.type != "cuda":
        return
    run()
    profiler, wall = profiled(run)
    spent: dict[str, list[float]] = {}
    for event in profiler.events():
        if "CUDA" in str(event.device_type):
            row = spent.setdefault(event.name, [0, 0.0])
            row[0] += 1
            row[1] += event.time_range.end - event.time_range.start
    total = sum(us for _, us in spent.values())
    print(f"kernels of {name}: {total / parts:.0f} us of {wall / parts * 1e6:.0f} us wall", flush=True)
    for kernel, (count, us) in sorted(spent.items(), key=lambda item: -item[1][1])[:most]:
        print(f"  {us / parts:9.1f} us {count / parts:7.1f} x {us / count:7.2f} us  {kernel[:110]}", flush=True)


def profile_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Kernels of a DiT evaluation, a reply, judging 8 latents and sampling 8 images."""
    config, compiling = model.config, model.speed.compile == "on"
    options = SamplingOptions(steps=4)
    evaluations = len(flow.evaluation_times(options.solver, options.steps, 8.0))
    for batch in (1, 8):
        conditions = list(torch.randn(batch, config.tokens, config.dit.condition_width))
        draw = partial(model.sample, conditions, list(range(batch)), options, batch)
        kernel_table(b, f"{size}: an evaluation of {evaluations}, batch {batch}", draw, evaluations)
    if b.figures and any("fp8" in r["name"] for r in b.figures):
        return
    conversation = Conversation(model.tokenizer.chat(prompt_of(model, 40)))
    for compile_steps in (False, True) if compiling else (False,):
        language = model.language if compile_steps == compiling else model.with_speed(Speed("off")).language
        run = partial(language.reply, [conversation], [33], -1, -1)
        run()
        kernel_table(b, f"{size}: a reply of 33 tokens, compiled {compile_steps}", run)
    latents = list(torch.randn(8, config.tokens, config.channels))
    judge = partial(
        model.score, latents, "a photo of a cat", request="a cat", request_reply=Reply([65]), max_new_tokens=4
    )
    judge()
    kernel_table(b, f"{size}: judging 8 latents, 4 tokens", judge)
    sample = partial(
        model.sample, [torch.randn(config.tokens, config.dit.condition_width)] * 8, list(range(8)), None, 8
    )
    kernel_table(b, f"{size}: sampling 8 images", sample, most=6)
