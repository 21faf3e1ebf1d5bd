"""Stages `checks`, `ladder` and `attention` of gpu.py: is each trick of fast_dit.py right, and what does it gain?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, relative_error
from benchmarks.gpu_dit import EVALUATIONS
from benchmarks.made_up import DIT_NAME, made_config, made_dit
from scale_rae import flow
from scale_rae.compiling import attention_kernels
from scale_rae.config import ScaleRAEConfig
from scale_rae.cuda_graphs import Captured
from scale_rae.dit import DiT, rope_table
from scale_rae.fast_blocks import Attend, attend_rotating
from scale_rae.fast_dit import FastDiT
from scale_rae.footprint import flops as dit_flops
from scale_rae.options import Speed


def checks(b: Bench) -> None:
    """Errors of a small network's latents: each fast way against plain float32 on the CPU, 8 Euler steps, guided and not."""
    cpu = torch.device("cpu")
    config = made_config("tiny").dit
    reference = made_dit("tiny", cpu, torch.float32)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(3, config.channels, config.side, config.side, generator=generator)
    condition = torch.randn(3, config.tokens, config.condition_width, generator=generator)

    def sample(dit: DiT, device: torch.device, guidance: float, speed: Speed | None) -> Tensor:
        times = flow.evaluation_times("euler", 8, 3.0)
        y = condition.to(device)
        null = dit.null_condition
        assert null is not None
        if speed is None:
            everywhere = null.expand_as(y).clone()
            conditional: flow.Velocity = lambda x, t: dit(x, torch.full((len(x),), t, device=device), y)  # noqa: E731
            nothing: flow.Velocity = lambda x, t: dit(x, torch.full((len(x),), t, device=device), everywhere)  # noqa: E731
            f = flow.guided(conditional, nothing, guidance)
        else:
            c, u, both = FastDiT(dit, speed).velocities(y, times, guidance != 1.0, speed.compile == "on")
            f = flow.guided(c, u, guidance, both=both)
        return flow.solve(flow.SAMPLERS["euler"], f, noise.to(device), flow.official_times(8, 3.0))

    ways: dict[str, tuple[torch.dtype, Speed | None, float]] = {
        "plain": (torch.float32, None, 1e-4),
        "fast eager": (torch.float32, Speed("off"), 1e-4),
        "fast eager bf16": (torch.bfloat16, Speed("off"), 2e-2),
        "fast compiled bf16": (torch.bfloat16, Speed("on"), 2e-2),
        "fast compiled bf16, nothing deferred": (torch.bfloat16, Speed("on", defer=False), 2e-2),
    }
    if b.device.type == "cuda":
        ways["fast eager bf16, the block for few images"] = (torch.bfloat16, Speed("off", few=True), 2e-2)
        ways["float8, the block for few images"] = (torch.bfloat16, Speed("on", "fp8", few=True), 1e-1)
        ways["PyTorch's attention"] = (torch.bfloat16, Speed("on", attention="flash"), 2e-2)
        ways["float8"] = (torch.bfloat16, Speed("on", "fp8"), 1e-1)
        ways["float8, PyTorch's attention"] = (torch.bfloat16, Speed("on", "fp8", attention="flash"), 1e-1)
        ways["float8 without our kernels"] = (torch.bfloat16, Speed("on", "fp8", kernels=False), 1e-1)
    with torch.inference_mode():
        for guidance in (1.0, 1.5):
            exact = sample(reference, cpu, guidance, None)
            for name, (dtype, speed, tolerance) in ways.items():
                if speed is not None and speed.compile == "on" and (b.device.type == "cpu" or guidance == 1.0):
                    continue  # on the CPU, minutes of C++ compilation
                check = f"{name}, guidance {guidance}"
                with b.reported(f"checks: {check}"):
                    dit = made_dit("tiny", cpu, torch.float32).to(b.device)
                    for path, parameter in dit.named_parameters():
                        if "t_embedder" not in path and ".norm" not in path:
                            parameter.data = parameter.data.to(dtype)
                    error = relative_error(sample(dit, b.device, guidance, speed), exact)
                    b.add("checks", f"{check}: relative error", error, "", f"≤ {tolerance}")
                    if not error <= tolerance:
                        b.errors[f"checks: {check}"] = f"relative error {error} > {tolerance}"


def evaluations(
    b: Bench, fast: FastDiT, config: ScaleRAEConfig, batch: int, guided: bool = False, prompts: int | None = None
) -> tuple[float, float]:
    """Seconds per image, extrapolated from 6 evaluations, and seconds of the first run of those 6."""
    y = torch.randn(prompts or batch, config.tokens, config.dit.condition_width, device=b.device, dtype=b.dtype)
    x = torch.randn(batch, config.channels, config.dit.side, config.dit.side, device=b.device)
    times = flow.evaluation_times("euler", EVALUATIONS, 8.0)[:6]
    velocity, _, both = fast.velocities(y, times, guided, fast.speed.compile == "on")

    def run() -> None:
        for t in times:
            (both if guided else velocity)(x, t)

    first, seconds = b.seconds(run)
    return seconds / len(times) * EVALUATIONS / batch, first


def ladder(b: Bench, size: str) -> None:
    """What each trick gains: seconds per image, extrapolated from 6 evaluations, with one more trick in each row."""
    dit = made_dit(size, b.device, b.dtype)
    config = made_config(size)
    flops = dit_flops(config.dit) * EVALUATIONS
    off: dict[str, Any] = {"graph": False, "pad": False, "group": False, "defer": False, "kernels": False}
    padded = off | {"pad": True}
    captured = padded | {"graph": True}
    grouped = captured | {"group": True}
    deferred = grouped | {"defer": True}
    # Name, tricks, batches (negative: all images of one prompt), whether guided.
    steps: tuple[tuple[str, Speed, tuple[int, ...], bool], ...] = (
        ("plain bf16, eager", Speed("off", **off), (1, 8, 32), False),
        ("eager in a CUDA graph", Speed("off", **off | {"graph": True}), (1, 8), False),
        ("blocks compiled", Speed("on", **off), (1, 8), False),
        ("and SwiGLU padded", Speed("on", **padded), (1, 8), False),
        ("and a CUDA graph", Speed("on", **captured), (1, 8), False),
        ("and grouped modulations", Speed("on", **grouped), (1, 2), False),
        ("and sums deferred", Speed("on", **deferred), (1, 4, 8, 32), False),
        ("and our attention (default)", Speed("on"), (1, 4, 8, 32), False),
        ("default but PyTorch's attention, nothing compiled", Speed("off", attention="flash"), (1,), False),
        ("default, nothing compiled", Speed("off"), (1,), False),
        ("default, but time embeddings at each step", Speed("on", before=False), (1,), False),
        ("default, with the block for few images", Speed("on", few=True), (1, 2), False),
        ("images of one prompt", Speed("on"), (-8,), False),
        ("guided", Speed("on"), (1, 8), True),
        ("guided, but both branches modulated alike", Speed("on", null=False), (8,), True),
        ("guided, but one branch after the other", Speed("on", together=False), (8,), True),
        ("float8 without kernels of our own", Speed("on", "fp8", kernels=False), (8,), False),
        ("float8 with PyTorch's attention", Speed("on", "fp8", attention="flash"), (8,), False),
        ("float8", Speed("on", "fp8"), (8,), False),
    )
    with torch.inference_mode():
        for name, speed, batches, guided in steps:
            if b.device.type == "cpu" and speed.compile == "on":
                continue
            torch.compiler.reset()  # so that the first run compiles, and the network before is freed
            if speed.quantize is not None:  # replaces the weights, so a new network
                dit = made_dit(size, b.device, b.dtype)
            fast = FastDiT(dit, speed)
            for batch in batches:
                with b.reported(f"ladder: {name}, batch {abs(batch)}"):
                    each, first = evaluations(b, fast, config, abs(batch), guided, 1 if batch < 0 else None)
                    # The number of operations depends on the tricks when guided, and for images of one prompt.
                    share: dict[str, Any] = {} if guided or batch < 0 else {"share": flops / each / b.ceiling}
                    title = f"{DIT_NAME[size]}, batch {abs(batch)}: {name}"
                    b.add("ladder", title, each, "s/image", first=first, **share)
            fast.forget()
            b.release()


def attention_stage(b: Bench, size: str) -> None:
    """Attention at the DiT's shape, rotation included: µs per call, on so many inputs that no cache holds them."""
    if b.device.type != "cuda":
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from scale_rae import kernels

    config = made_config(size).dit
    cos, sin = (kernels.of_axis(table.to(b.device)) for table in rope_table(config.side, config.width // config.heads))

    def cudnn(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend_rotating(x, heads, cos, sin)

    ways: dict[str, Attend] = {
        "PyTorch's": attend_rotating,
        "cuDNN's": cudnn,
        "ours": kernels.attend_pairs,
    }
    for batch in (1, 2, 4, 8, 16, 32):
        count = max(4, 320 // batch)
        inputs = torch.randn(count, batch, config.tokens, 3 * config.width, device=b.device, dtype=b.dtype)
        for name, way in ways.items():
            if way is kernels.attend_pairs and not kernels.attention_fits(config, b.dtype):
                continue

            def attend_all(x: Tensor, way: Attend = way) -> Tensor:
                for qkv in x:
                    seen = way(qkv, config.heads, cos, sin)
                return seen

            with b.reported(f"attention: {name}, batch {batch}"), attention_kernels(b.device), torch.inference_mode():
                captured = Captured(attend_all, [inputs])
                _, seconds = b.seconds(captured.graph.replay)
                b.add("attention", f"{DIT_NAME[size]}, batch {batch}: {name}", seconds / count * 1e6, "µs")
                del captured
        del inputs
        b.release()
