"""Triton kernels between the products of a DiT block for one or two images.

With 256 rows, a block's eight kernels are so short that the gaps between them count. So each of these kernels is launched while
the product before it ends (programmatic dependent launch) and then waits for it. They finish products that cuBLAS leaves in
`fast_blocks.Parts`: they add the parts of a split inner dimension, multiply by the scales of float8, and add the bias.

The functions are torch operators, for Hopper, where they were measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scale_rae.float8 import FLOAT8, LARGEST, LEAST

_EARLY: dict[str, Any] = {"launch_pdl": True}


def fits(width: int, inner: int) -> bool:
    """Whether these kernels support blocks of a width and an inner width of SwiGLU, with this version of Triton."""
    return width % 32 == 0 and inner % 32 == 0 and hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _finished(sums, x_scale, scale, bias, row, i, inside):
    """Columns i of a row of `Parts.finished`, from the sum of its values."""
    if x_scale is not None:
        sums *= tl.load(x_scale + row) * tl.load(scale + i, mask=inside, other=0.0)
    return sums + tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normed_kernel(
    x,
    parts,
    x_scale,
    part_scale,
    bias,
    gate,
    null_gate,
    shift,
    factor,
    null_shift,
    null_factor,
    weight,
    x_out,
    out,
    out_scale,
    tokens,
    each,
    conditional,
    rows,
    gate_stride,
    modulation_stride,
    width,
    eps,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
):
    tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    h = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(parts + row * width + i, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        update += tl.load(parts + (part * rows + row) * width + i, mask=inside, other=0.0).to(tl.float32)
    if null_gate is None or row < conditional:
        place = row // tokens // each * tokens + row % tokens  # of the row's prompt, which has `each` images
        g = tl.load(gate + place * gate_stride + i, mask=inside, other=0.0).to(tl.float32)
        f = tl.load(factor + place * modulation_stride + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(shift + place * modulation_stride + i, mask=inside, other=0.0).to(tl.float32)
    else:
        g = tl.load(null_gate + i, mask=inside, other=0.0).to(tl.float32)
        f = tl.load(null_factor + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(null_shift + i, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        update = _finished(update, x_scale, part_scale, bias, row, i, inside)
    rounded = (h + g * update).to(x_out.dtype.element_ty)
    tl.store(x_out + row * width + i, rounded, mask=inside)
    h = rounded.to(tl.float32)
    by = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, axis=0) / width + eps) * by * (1.0 + f) + s
    if QUANTIZE:
        largest = tl.maximum(tl.max(tl.abs(h), axis=0), LEAST)
        tl.store(out_scale + row, largest / LARGEST)
        h *= LARGEST / largest
    tl.store(out + row * width + i, h.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gate, value):
    return gate * tl.sigmoid(gate) * value


@triton.jit
def _gated_kernel(x, out, width, BLOCK: tl.constexpr):
    """SiLU(gate) · value of BLOCK columns of a row."""
    tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    gate = tl.load(x + row * 2 * width + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * width + width + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + i, _gated(gate, value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _raw_gated(x, x_scale, scale, bias, row, i, width):
    inside = i < width
    gate = tl.load(x + row * 2 * width + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * width + width + i, mask=inside, other=0.0).to(tl.float32)
    gate = _finished(gate, x_scale, scale, bias, row, i, inside)
    return _gated(gate, _finished(value, x_scale, scale + width, bias + width, row, i, inside))


@triton.jit
def _quantized_gated_kernel(
    x,
    x_scale,
    scale,
    bias,
    out,
    out_scale,
    width,
    MOST: tl.constexpr,
    REST: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
):
    """A row of SiLU(gate) · value in float8, from a raw product. It is split into a power of two and a rest, to save lanes."""
    tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MOST)
    values = _raw_gated(x, x_scale, scale, bias, row, i, width)
    largest = tl.max(tl.abs(values), axis=0)
    if REST > 0:
        j = MOST + tl.arange(0, REST)
        others = _raw_gated(x, x_scale, scale, bias, row, j, width)
        largest = tl.maximum(largest, tl.max(tl.abs(others), axis=0))
    largest = tl.maximum(largest, LEAST)
    tl.store(out_scale + row, largest / LARGEST)
    tl.store(out + row * width + i, (values * (LARGEST / largest)).to(out.dtype.element_ty), mask=i < width)
    if REST > 0:
        tl.store(out + row * width + j, (others * (LARGEST / largest)).to(out.dtype.element_ty), mask=j < width)


# --- operators -------------------------------------------------------------------------------------------------------


def _float8_rows(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    values = torch.empty((*x.shape[:-1], width), dtype=FLOAT8, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


@torch.library.custom_op("scale_rae::few_normed", mutates_args=())
def few_normed(
    x: Tensor,
    parts: Tensor,
    x_scale: Tensor | None,
    part_scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor,
    null_gate: Tensor | None,
    shift: Tensor,
    factor: Tensor,
    null_shift: Tensor | None,
    null_factor: Tensor | None,
    weight: Tensor,
    eps: float,
    float8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.quantize_normed` for an update in `fast_blocks.Parts`: (x', values, scale).

    Without a bias, the update is the sum of its parts. Without `float8`, values are in x's dtype and there are no scales.
    """
    images, tokens, width = x.shape
    conditional = images if null_gate is None else images // 2
    each = conditional // len(gate)
    x_out, values, scale = _normed_room(x, float8)
    gates, shifts, factors = gate.flatten(0, -2), shift.flatten(0, -2), factor.flatten(0, -2)
    if shifts.stride(0) != factors.stride(0) or each * len(gate) != conditional or len(gate) != len(shift):
        raise ValueError("shift and factor must be parts of one tensor, with equally many images per prompt")
    block = triton.next_power_of_2(width)
    with torch.cuda.device(x.device):
        _normed_kernel[(images * tokens,)](
            x.contiguous(),
            parts.contiguous(),
            x_scale,
            part_scale,
            bias,
            gates,
            null_gate,
            shifts,
            factors,
            null_shift,
            null_factor,
            weight,
            x_out,
            values,
            scale,
            tokens,
            each,
            conditional * tokens,
            images * tokens,
            gates.stride(0),
            shifts.stride(0),
            width,
            eps,
            PARTS=len(parts),
            BLOCK=block,
            QUANTIZE=float8,
            LARGEST=LARGEST,
            LEAST=LEAST,
            num_warps=4 if block <= 2048 else 8,
            **_EARLY,
        )
    return x_out, values, scale


def _normed_room(x: Tensor, float8: bool) -> tuple[Tensor, Tensor, Tensor]:
    values, scale = _float8_rows(x, x.shape[-1]) if float8 else (torch.empty_like(x), x.new_empty(0))
    return torch.empty_like(x), values, scale


@few_normed.register_fake
def _(x: Tensor, parts: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _normed_room(x, rest[-1])


@torch.library.custom_op("scale_rae::few_gated", mutates_args=())
def few_gated(x: Tensor) -> Tensor:
    """SiLU(gate) · value [..., K]; gate and value are side by side in x [..., 2 K]."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    with torch.cuda.device(x.device):
        _gated_kernel[(out.numel() // width, triton.cdiv(width, 1024))](
            x, out, width, BLOCK=1024, num_warps=4, **_EARLY
        )
    return out


@few_gated.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("scale_rae::few_gated_float8", mutates_args=())
def few_gated_float8(x: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale) of `kernels.quantize_swiglu`, for the raw product x [..., 2 K] of `Parts`."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    values, by_token = _float8_rows(x, width)
    most = triton.next_power_of_2(width)
    if most > width:
        most //= 2
    rest = triton.next_power_of_2(width - most) if width > most else 0
    with torch.cuda.device(x.device):
        _quantized_gated_kernel[(by_token.numel(),)](
            x,
            x_scale,
            scale,
            bias,
            values,
            by_token,
            width,
            MOST=most,
            REST=rest,
            LARGEST=LARGEST,
            LEAST=LEAST,
            num_warps=8,
            **_EARLY,
        )
    return values, by_token


@few_gated_float8.register_fake
def _(x: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _float8_rows(x, x.shape[-1] // 2)
