"""Stages `ceilings` and `gemm` of gpu.py: the rates of matrix products and copies, apart from any network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.made_up import made_config
from scale_rae.cuda_graphs import graph_memory
from scale_rae.float8 import quantize
from scale_rae.layout import swiglu_inner
from scale_rae.quantization import product, quantize_weight


def ceilings(b: Bench) -> None:
    """The rates that all shares refer to, on random data, since zeros run faster."""
    side = 256 if b.tiny else 8192
    x, y = (torch.randn(side, side, device=b.device, dtype=b.dtype) for _ in range(2))
    out = torch.empty_like(x)
    times = 2 if b.tiny else 20

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(x, y, out=out)

    _, seconds = b.seconds(lambda: products(times), 5)
    b.ceiling = 2.0 * side**3 * times / seconds
    b.add("ceilings", f"bf16 matrix product {side}³", b.ceiling / 1e12, "TFLOP/s")
    many = 4 if b.tiny else round(b.ceiling / (2.0 * side**3))  # at its power limit a chip slows down
    _, seconds = b.seconds(lambda: products(many), 1)
    b.sustained = 2.0 * side**3 * many / seconds
    b.add("ceilings", f"bf16 matrix product {side}³, sustained for {seconds:.2f} s", b.sustained / 1e12, "TFLOP/s")
    count = 1 << (20 if b.tiny else 30)
    source = torch.randint(0, 100, (count,), dtype=torch.int32, device=b.device)
    copy = torch.empty_like(source)
    _, seconds = b.seconds(lambda: copy.copy_(source), 5)
    b.add("ceilings", "device copy, read + written", 8.0 * count / seconds / 1e12, "TB/s")
    if b.device.type == "cuda" and torch.cuda.get_device_capability(b.device) >= (8, 9):
        with contextlib.suppress(Exception):
            one = torch.ones(side, 1, device=b.device)
            x8, y8 = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)

            def float8() -> None:
                for _ in range(times):
                    torch._scaled_mm(x8, y8.t(), one, one.t(), out_dtype=torch.bfloat16, use_fast_accum=True)

            _, seconds = b.seconds(float8, 5)
            b.add(
                "ceilings", f"float8 matrix product by rows {side}³", 2.0 * side**3 * times / seconds / 1e12, "TFLOP/s"
            )


def gemm_stage(b: Bench, size: str) -> None:
    """The DiT's matrix products alone, as CUDA graphs: bf16, and float8 scaled by rows, with and without the bias."""
    if b.device.type != "cuda":
        return
    c = made_config(size).dit
    inner = -(-swiglu_inner(c.width) // 64) * 64
    shapes = {"qkv": (3 * c.width, c.width), "proj": (c.width, c.width), "w12": (2 * inner, c.width)}
    shapes |= {
        "w3": (c.width, inner),
        "adaLN": (6 * c.width, c.condition_width),
        "8 adaLN": (48 * c.width, c.condition_width),
    }
    for rows in (256, 2048, 8192):
        for name, (n, k) in shapes.items():
            if name == "8 adaLN" and rows > 256:
                continue
            with torch.inference_mode():
                x, w = (torch.randn(m, k, device=b.device, dtype=b.dtype) for m in (rows, n))
                bias = torch.randn(n, device=b.device, dtype=b.dtype)
                xq, w8 = quantize(x), quantize_weight("fp8", w)
                ways: dict[str, Callable[[], Tensor]] = {
                    "bf16": partial(torch.nn.functional.linear, x, w, bias),
                    "float8": partial(product, xq, w8, bias),
                    "float8 without bias": partial(product, xq, w8),
                }
                line = [f"gemm      {rows:5} x {k:5} -> {n:6} ({name:7})"]
                for way, run in ways.items():
                    try:
                        graph, _ = graph_memory(b.device).capture(lambda run=run: [run() for _ in range(10)][-1])  # type: ignore[misc]
                        _, seconds = b.seconds(graph.replay, 5)
                        us = seconds / 10 * 1e6
                        line.append(f"{way} {us:7.1f} us {2e-6 * rows * n * k / us:5.0f} TFLOP/s")
                    except Exception as e:
                        line.append(f"{way}: {type(e).__name__}: {str(e)[:80]}")
                print("   ".join(line), flush=True)
