"""A DiT block for one or two images, in Triton: products that fill the GPU with few rows, each kernel launched before the last ends.

With 256 rows, cuBLAS's tiles occupy a part of the multiprocessors, and a block's eight kernels are so short that the gaps between
them count. Here

- tiles are chosen so that each product is one wave of programs; products with few outputs split the inner dimension, and the
  next kernel adds the parts;
- SwiGLU is computed where its input is: a program multiplies as many gates as values;
- a kernel starts while the one before ends (programmatic dependent launch). While it waits for its input, a product asks for its
  weights, so that the L2 cache has them by then.

The public functions are torch operators. Only for Hopper, where they were measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scale_rae.float8 import FLOAT8, LARGEST, LEAST

PARTS = 4  # in which the inner dimension of products with few outputs is computed


@triton.jit
def _prefetch(at, BYTES: tl.constexpr):
    """Asks for BYTES bytes from each address to be copied to the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,n",
        [at, BYTES],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _quantized(values, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    largest = tl.maximum(tl.max(tl.abs(values), axis=0), LEAST)
    return values * (LARGEST / largest), largest / LARGEST


@triton.jit
def _normed_kernel(
    x,
    parts,
    gate,
    null_gate,
    shift,
    factor,
    null_shift,
    null_factor,
    weight,
    x_out,
    out,
    scale,
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
    """x' = x + gate · (sum of the update's parts); norm(x') · (1 + factor) + shift, of one row."""
    i = tl.arange(0, BLOCK)
    inside = i < width
    by = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    h = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(parts + row * width + i, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        added += tl.load(parts + (part * rows + row) * width + i, mask=inside, other=0.0).to(tl.float32)
    if null_gate is None or row < conditional:
        place = row // tokens // each * tokens + row % tokens  # of the row's prompt, which has `each` images
        g = tl.load(gate + place * gate_stride + i, mask=inside, other=0.0).to(tl.float32)
        f = tl.load(factor + place * modulation_stride + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(shift + place * modulation_stride + i, mask=inside, other=0.0).to(tl.float32)
    else:
        g = tl.load(null_gate + i, mask=inside, other=0.0).to(tl.float32)
        f = tl.load(null_factor + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(null_shift + i, mask=inside, other=0.0).to(tl.float32)
    rounded = (h + g * added).to(x_out.dtype.element_ty)
    tl.store(x_out + row * width + i, rounded, mask=inside)
    h = rounded.to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, axis=0) / width + eps) * by * (1.0 + f) + s
    if QUANTIZE:
        h, by_row = _quantized(h, LARGEST, LEAST)
        tl.store(scale + row, by_row)
    tl.store(out + row * width + i, h.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rows_kernel(x, out, scale, width, BLOCK: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    """`kernels.quantize_rows`, launched early."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    values = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    values, by_row = _quantized(values, LARGEST, LEAST)
    tl.store(scale + row, by_row)
    tl.store(out + row * width + i, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(
    x,
    x_scale,
    weight,
    rest,
    weight_pointer,
    scale,
    bias,
    out,
    rows,
    outputs,
    inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    REST: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    END: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """x [M, K] · weight [N, K]ᵀ + bias. A program computes ROWS by OUTPUTS + REST (or, without a rest, 0) sums.

    x, weight, rest: tensor descriptors; `rest` is the weight by tiles of REST rows. With scales, x and weight are float8.
    END "store": out [M, N]. "parts": out float32 [PARTS, M, N]. "swiglu": out [M, N/2]; the weight's first half are the gates,
    and half of a program's sums are gates, the others their values.
    """
    tl.extra.cuda.gdc_launch_dependents()
    HALVES: tl.constexpr = 2 if END == "swiglu" else 1
    width = outputs // HALVES  # of the result
    WIDE: tl.constexpr = (OUTPUTS + REST) // HALVES
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    tiles = row_tiles * tl.cdiv(width, WIDE)
    part = pid // tiles
    first_row = pid % row_tiles * ROWS
    first = pid % tiles // row_tiles * WIDE
    steps = tl.cdiv(inputs, INPUTS)
    start, stop = part * steps // PARTS, (part + 1) * steps // PARTS
    if PREFETCH > 0 and first_row == 0:
        BYTES: tl.constexpr = PREFETCH * INPUTS * (weight_pointer.dtype.element_ty.primitive_bitwidth // 8)
        _prefetch_rows(weight_pointer, first, width, inputs, start * INPUTS, OUTPUTS, HALVES, BYTES)
        if REST > 0:
            after = first + OUTPUTS // HALVES
            _prefetch_rows(weight_pointer, after, width, inputs, start * INPUTS, REST, HALVES, BYTES)
    tl.extra.cuda.gdc_wait()
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    if REST > 0:
        acc_rest = tl.zeros((ROWS, REST), tl.float32)
    for k in tl.range(start, stop, num_stages=STAGES):
        read = x.load([first_row, k * INPUTS])
        w = weight.load([0, first, k * INPUTS]).reshape(OUTPUTS, INPUTS)
        acc = tl.dot(read, w.T, acc)
        if REST > 0:
            w_rest = rest.load([0, first + OUTPUTS // HALVES, k * INPUTS]).reshape(REST, INPUTS)
            acc_rest = tl.dot(read, w_rest.T, acc_rest)
    _end(acc, x_scale, scale, bias, out, rows, width, first_row, first, part, ROWS, OUTPUTS, END)
    if REST > 0:
        after = first + OUTPUTS // HALVES
        _end(acc_rest, x_scale, scale, bias, out, rows, width, first_row, after, part, ROWS, REST, END)


@triton.jit
def _prefetch_rows(weight, first, width, inputs, start, COUNT: tl.constexpr, HALVES: tl.constexpr, BYTES: tl.constexpr):
    """Asks for BYTES bytes of COUNT rows from `first` on; with two HALVES, of half as many rows in each half of the weight."""
    i = tl.arange(0, COUNT)
    row = tl.minimum(first + i % (COUNT // HALVES), width - 1) + i // (COUNT // HALVES) * width
    _prefetch((weight + row.to(tl.int64) * inputs + start).to(tl.int64), BYTES)


@triton.jit
def _scaled(acc, x_scale, scale, bias, m, is_m, n, is_n):
    if x_scale is not None:
        acc *= tl.load(x_scale + m, mask=is_m, other=0.0)[:, None] * tl.load(scale + n, mask=is_n, other=0.0)[None, :]
    return acc + tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _end(
    acc,
    x_scale,
    scale,
    bias,
    out,
    rows,
    width,
    first_row,
    first,
    part,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    END: tl.constexpr,
):
    """Scales, adds the bias and stores sums [ROWS, OUTPUTS]."""
    m = first_row + tl.arange(0, ROWS)
    is_m = m < rows
    if END == "swiglu":
        n = first + tl.arange(0, OUTPUTS // 2)
        is_n = n < width
        gate, value = tl.split(acc.reshape(ROWS, 2, OUTPUTS // 2).permute(0, 2, 1))
        gate = _scaled(gate, x_scale, scale, bias, m, is_m, n, is_n)
        value = _scaled(value, x_scale, scale, bias, m, is_m, width + n, is_n)
        acc = gate * tl.sigmoid(gate) * value
    else:
        n = first + tl.arange(0, OUTPUTS)
        is_n = n < width
        if END == "parts":
            if x_scale is not None:
                by = tl.load(scale + n, mask=is_n, other=0.0)
                acc *= tl.load(x_scale + m, mask=is_m, other=0.0)[:, None] * by[None, :]
            acc += tl.where(part == 0, tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32), 0.0)[None, :]
        else:
            acc = _scaled(acc, x_scale, scale, bias, m, is_m, n, is_n)
    at = out + (part.to(tl.int64) * rows + m[:, None]) * width + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])


# --- launches --------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How `_product_kernel` divides a product."""

    rows: int
    outputs: int
    rest: int
    inputs: int  # bytes
    stages: int
    warps: int
    prefetch: int = 8


WIDE = Tile(128, 128, 64, 128, 4, 8)
NARROW = Tile(128, 64, 32, 128, 5, 8)
SQUARE = Tile(128, 128, 0, 128, 4, 8)
TILES: dict[str, Tile] = {"store": NARROW, "swiglu": WIDE, "parts": SQUARE}


def fits(width: int, inner: int) -> bool:
    """Whether these kernels support blocks of a width and an inner width of SwiGLU: their rows in bytes are multiples of 16."""
    return width % 16 == 0 and inner % 16 == 0 and hasattr(tl.extra, "cuda") and hasattr(tl.extra.cuda, "gdc_wait")


def _early() -> dict[str, bool]:
    return {"launch_pdl": True}


@torch.library.custom_op("scale_rae::few_product", mutates_args=())
def few_product(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor | None, bias: Tensor, end: str
) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias in bfloat16, by `end`: "store" [..., N]; "swiglu" [..., N/2], where the first half
    of the weight are the gates; "parts" float32 [PARTS, ..., N], whose sum is the product.

    With scales, x and weight are float8: x_scale [..., 1], scale [N, 1].
    """
    rows, inputs = x.numel() // x.shape[-1], x.shape[-1]
    outputs = len(weight)
    out = _room(x, outputs, end)
    tile = TILES[end]
    flat = x.view(rows, inputs)
    step = tile.inputs // x.element_size()
    parts = PARTS if end == "parts" else 1
    count = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs + tile.rest) * parts
    halves = 2 if end == "swiglu" else 1
    by_halves = weight.view(halves, outputs // halves, inputs)
    with torch.cuda.device(x.device):
        _product_kernel[(count,)](
            TensorDescriptor.from_tensor(flat, [tile.rows, step]),
            x_scale,
            TensorDescriptor.from_tensor(by_halves, [halves, tile.outputs // halves, step]),
            TensorDescriptor.from_tensor(by_halves, [halves, (tile.rest or tile.outputs) // halves, step]),
            weight,
            scale,
            bias,
            out,
            rows,
            outputs,
            inputs,
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            REST=tile.rest,
            INPUTS=step,
            PARTS=parts,
            END=end,
            STAGES=tile.stages,
            PREFETCH=tile.prefetch,
            num_warps=tile.warps,
            **_early(),
        )
    return out


def _room(x: Tensor, outputs: int, end: str) -> Tensor:
    if end == "parts":
        return torch.empty(PARTS, *x.shape[:-1], outputs, dtype=torch.float32, device=x.device)
    width = outputs // 2 if end == "swiglu" else outputs
    return torch.empty(*x.shape[:-1], width, dtype=torch.bfloat16, device=x.device)


@few_product.register_fake
def _(x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor | None, bias: Tensor, end: str) -> Tensor:
    return _room(x, len(weight), end)


@torch.library.custom_op("scale_rae::few_rows", mutates_args=())
def few_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.quantize_rows`."""
    width = x.shape[-1]
    values, scale = _float8_rows(x)
    block = triton.next_power_of_2(width)
    with torch.cuda.device(x.device):
        _rows_kernel[(x.numel() // width,)](
            x,
            values,
            scale,
            width,
            BLOCK=block,
            LARGEST=LARGEST,
            LEAST=LEAST,
            num_warps=4 if block <= 2048 else 8,
            **_early(),
        )
    return values, scale


def _float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


@few_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _float8_rows(x)


@torch.library.custom_op("scale_rae::few_normed", mutates_args=())
def few_normed(
    x: Tensor,
    parts: Tensor,
    gate: Tensor,
    null_gate: Tensor | None,
    shift: Tensor,
    factor: Tensor,
    null_shift: Tensor | None,
    null_factor: Tensor | None,
    weight: Tensor,
    eps: float,
    quantize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.quantize_normed` for an update [S, B, L, D] in parts that are yet to be summed; (x', values, scale).

    Without `quantize`, values are in x's dtype and there are no scales.
    """
    images, tokens, width = x.shape
    conditional = images if null_gate is None else images // 2
    each = conditional // len(gate)
    x_out, values, scale = _normed_room(x, quantize)
    gates, shifts, factors = gate.flatten(0, -2), shift.flatten(0, -2), factor.flatten(0, -2)
    if shifts.stride(0) != factors.stride(0) or each * len(gate) != conditional or len(gate) != len(shift):
        raise ValueError("shift and factor must be parts of one tensor, with equally many images per prompt")
    block = triton.next_power_of_2(width)
    with torch.cuda.device(x.device):
        _normed_kernel[(images * tokens,)](
            x,
            parts,
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
            QUANTIZE=quantize,
            LARGEST=LARGEST,
            LEAST=LEAST,
            num_warps=4 if block <= 2048 else 8,
            **_early(),
        )
    return x_out, values, scale


def _normed_room(x: Tensor, quantize: bool) -> tuple[Tensor, Tensor, Tensor]:
    values, scale = _float8_rows(x) if quantize else (torch.empty_like(x), x.new_empty(0))
    return torch.empty_like(x), values, scale


@few_normed.register_fake
def _(x: Tensor, parts: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _normed_room(x, rest[-1])
