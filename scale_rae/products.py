"""Triton products with quantised weights, for NVIDIA GPUs. The forms of weights are those of quantization.py.

- A few rows, as in decoding: reading the weights takes longest, so a kernel converts them as it reads them.
- More rows: one kernel converts the weights, and cuBLAS multiplies. (A kernel that converts tiles of weights on their way to the
  tensor cores took longer at each size from 128 to 2,048 rows: each tile of outputs converts them anew.)
- int8 products: activations are quantised per token; the kernel multiplies the int32 sums by both scales and adds the bias.

`rows` below are tokens; N is the number of outputs, K that of inputs. The public functions are torch operators.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scale_rae.codes import NF4
from scale_rae.kernels import quantize_rows

FEW = 64  # most rows of the kernel for a few
SOME = 512  # most rows of an int8 product with small tiles


# --- NF4's codes to values -------------------------------------------------------------------------------------------


def _lookup(dtype: torch.dtype) -> str:
    """PTX that turns 4 bytes, 8 codes, into the 16-bit values of their low halves ($0, $1) and high halves ($2, $3).

    prmt looks four codes of 3 bits up in a table of 8 bytes. So each value's low and high byte are looked up in both halves of
    the table, and a code's highest bit chooses between them.
    """
    bits = [int(v) & 0xFFFF for v in torch.tensor(NF4, dtype=torch.float32).to(dtype).view(torch.int16)]
    words = [
        [hex(sum((bits[4 * w + i] >> shift & 0xFF) << 8 * i for i in range(4))) for w in range(4)] for shift in (0, 8)
    ]
    lines = [
        ".reg .b32 s, t, su, tu, a, b, l, h;",
        "and.b32 s, $4, 0x77777777;",
        "shr.u32 t, $4, 1;",
        "and.b32 t, t, 0x44444444;",
        "or.b32 t, t, 0x32103210;",
        "shr.u32 su, s, 16;",
        "shr.u32 tu, t, 16;",
    ]
    for low, high, s, t in (("$0", "$2", "s", "t"), ("$1", "$3", "su", "tu")):
        for byte, table in (("l", words[0]), ("h", words[1])):
            lines += [
                f"prmt.b32 a, {table[0]}, {table[1]}, {s};",
                f"prmt.b32 b, {table[2]}, {table[3]}, {s};",
                f"prmt.b32 {byte}, a, b, {t};",
            ]
        lines += [f"prmt.b32 {low}, l, h, 0x6240;", f"prmt.b32 {high}, l, h, 0x7351;"]
    return "{ " + " ".join(lines) + " }"


_TO_BFLOAT16 = tl.constexpr(_lookup(torch.bfloat16))
_TO_FLOAT16 = tl.constexpr(_lookup(torch.float16))


@triton.jit
def _nf4_values(codes, dtype: tl.constexpr):
    """The values of the low and of the high halves of bytes; both have the shape of `codes`."""
    if dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _TO_BFLOAT16, "=&r,=&r,=&r,=&r,r", [codes], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _TO_FLOAT16, "=&r,=&r,=&r,=&r,r", [codes], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    return low, high


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _few_kernel(
    x,
    x_scale,
    values,
    scale,
    bias,
    out,
    rows,
    outputs,
    inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WARPS: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """KIND "rows": int8 or float8 weights; "nf4"; "int8": int8 activations too. Each warp adds INPUTS columns per step.

    WHOLE: all warps have columns in all steps.
    """
    TYPE: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_n, is_m = n < outputs, m < rows
    at_n = tl.where(is_n, n, 0).to(tl.int64)
    warp = tl.arange(0, WARPS)
    acc = tl.zeros((WARPS, OUTPUTS, ROWS), tl.int32 if KIND == "int8" else tl.float32)
    if KIND == "nf4":
        j = tl.arange(0, 32)
        blocks = inputs // 64
        for first in range(0, blocks, WARPS):
            block = first + warp
            mine = block < blocks
            at = values + at_n[None, :, None] * (inputs // 2) + block[:, None, None] * 32 + j[None, None, :]
            at_scale = scale + at_n[None, :] * blocks + block[:, None]
            at_x = x + m[None, None, :] * inputs + block[:, None, None] * 64 + j[None, :, None]
            is_x = is_m[None, None, :] & mine[:, None, None]
            if WHOLE:
                codes, by = tl.load(at), tl.load(at_scale)
            else:
                codes = tl.load(at, mask=mine[:, None, None], other=0)
                by = tl.load(at_scale, mask=mine[:, None], other=0.0)
            low = tl.load(at_x, mask=is_x, other=0.0)
            high = tl.load(at_x + 32, mask=is_x, other=0.0)
            w_low, w_high = _nf4_values(codes, TYPE)
            acc += tl.dot(w_high, high, tl.dot(w_low, low)) * by.to(tl.float32)[:, :, None]
    else:
        i = warp[:, None] * INPUTS + tl.arange(0, INPUTS)[None, :]  # [WARPS, INPUTS]
        for k in range(0, inputs, WARPS * INPUTS):
            at = values + at_n[None, :, None] * inputs + k + i[:, None, :]
            at_x = x + m[None, None, :] * inputs + k + i[:, :, None]
            if WHOLE:
                w = tl.load(at)
                read = tl.load(at_x, mask=is_m[None, None, :], other=0.0)
            else:
                mine = k + i < inputs
                w = tl.load(at, mask=mine[:, None, :], other=0.0)
                read = tl.load(at_x, mask=is_m[None, None, :] & mine[:, :, None], other=0.0)
            acc = tl.dot(w.to(TYPE), read, acc, out_dtype=acc.dtype)
    sums = tl.sum(acc, axis=0).to(tl.float32)
    if KIND != "nf4":
        sums *= tl.load(scale + at_n)[:, None]
    if KIND == "int8":
        sums *= tl.load(x_scale + m, mask=is_m, other=0.0)[None, :]
    if bias is not None:
        sums += tl.load(bias + at_n).to(tl.float32)[:, None]
    at_out = out + m[None, :].to(tl.int64) * outputs + n[:, None]
    tl.store(at_out, sums.to(out.dtype.element_ty), mask=is_m[None, :] & is_n[:, None])


@triton.jit
def _int8_kernel(
    x,
    x_scale,
    values,
    scale,
    bias,
    out,
    rows,
    outputs,
    inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """int8 activations times int8 weights; x and values are tensor descriptors."""
    first_row = tl.program_id(0) * ROWS
    first = tl.program_id(1) * OUTPUTS
    acc = tl.zeros((ROWS, OUTPUTS), tl.int32)
    for k in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        acc = tl.dot(x.load([first_row, k]), values.load([first, k]).T, acc, out_dtype=tl.int32)
    n = first + tl.arange(0, OUTPUTS)
    m = first_row + tl.arange(0, ROWS)
    is_n, is_m = n < outputs, m < rows
    sums = acc.to(tl.float32) * tl.load(x_scale + m, mask=is_m, other=0.0)[:, None]
    sums *= tl.load(scale + n, mask=is_n, other=0.0)[None, :]
    if bias is not None:
        sums += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
    at = out + m[:, None].to(tl.int64) * outputs + n[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])


@triton.jit
def _dequantize_kernel(values, scale, out, inputs, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """One row of weights, WIDTH columns at a time."""
    TYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if KIND == "nf4":
        i = tl.arange(0, WIDTH // 2)
        for start in range(0, inputs // 2, WIDTH // 2):
            inside = start + i < inputs // 2
            codes = tl.load(values + row * (inputs // 2) + start + i, mask=inside, other=0.0)
            by = tl.load(scale + row * (inputs // 64) + (start + i) // 32, mask=inside, other=0.0).to(tl.float32)
            low, high = _nf4_values(codes, TYPE)
            at = out + row * inputs + (start + i) // 32 * 64 + i % 32
            tl.store(at, (low.to(tl.float32) * by).to(TYPE), mask=inside)
            tl.store(at + 32, (high.to(tl.float32) * by).to(TYPE), mask=inside)
    else:
        i = tl.arange(0, WIDTH)
        by = tl.load(scale + row)
        for start in range(0, inputs, WIDTH):
            inside = start + i < inputs
            w = tl.load(values + row * inputs + start + i, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + row * inputs + start + i, (w * by).to(TYPE), mask=inside)


# --- launches --------------------------------------------------------------------------------------------------------


@functools.cache
def supports(kind: str, device: torch.device) -> bool:
    """Whether these operators compute a kind's products on an NVIDIA GPU."""
    capability = torch.cuda.get_device_capability(device)
    if kind == "int8-products":
        return capability[0] == 9
    return capability >= ((8, 9) if kind == "fp8-storage" else (8, 0))


def dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: `QuantizedWeight.dequantize` in one kernel."""
    kind = "nf4" if values.dtype == torch.uint8 else "rows"
    outputs, inputs = len(values), values.shape[1] * (2 if kind == "nf4" else 1)
    out = torch.empty(outputs, inputs, dtype=dtype, device=values.device)
    width = min(4096, triton.next_power_of_2(inputs))
    with torch.cuda.device(values.device):
        _dequantize_kernel[(outputs,)](values, scale, out, inputs, WIDTH=width, KIND=kind, num_warps=4)
    return out


def _few(
    x: Tensor, x_scale: Tensor | None, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows, inputs = x.shape
    outputs = len(values)
    kind = "nf4" if values.dtype == torch.uint8 else "rows" if x_scale is None else "int8"
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    at_once, per, columns, warps = max(16, triton.next_power_of_2(rows)), 16 if outputs <= 8192 else 32, 64, 4
    with torch.cuda.device(x.device):
        _few_kernel[(triton.cdiv(outputs, per),)](
            x,
            x_scale,
            values,
            scale,
            bias,
            out,
            rows,
            outputs,
            inputs,
            ROWS=at_once,
            OUTPUTS=per,
            INPUTS=columns,
            WARPS=warps,
            KIND=kind,
            WHOLE=inputs % (64 * warps) == 0,
            num_warps=warps,
            num_stages=4,
        )
    return out


def _linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times a weight in one of the forms, plus bias, in x's dtype."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if len(rows) <= FEW:
        out = _few(rows, None, values, scale, bias, x.dtype)
    else:
        out = F.linear(rows, dequantized(values, scale, x.dtype), bias)
    return out.view(*x.shape[:-1], len(values))


def _linear_room(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(values)))


@torch.library.custom_op("scale_rae::int8_linear", mutates_args=())
def int8_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times int8 weights [N, K] with a scale [N, 1] per row, plus bias [N], in x's dtype: [..., N]."""
    return _linear(x, values, scale, bias)


@torch.library.custom_op("scale_rae::float8_linear", mutates_args=())
def float8_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`int8_linear` for float8 weights."""
    return _linear(x, values, scale, bias)


@torch.library.custom_op("scale_rae::nf4_linear", mutates_args=())
def nf4_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`int8_linear` for nf4 weights: uint8 [N, K/2], scale [N, K/64]."""
    return _linear(x, values, scale, bias)


for _operator in (int8_linear, float8_linear, nf4_linear):
    _operator.register_fake(_linear_room)


@torch.library.custom_op("scale_rae::int8_products", mutates_args=())
def int8_products(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`int8_linear`, with x quantised to int8 per token."""
    quantized, by_token = quantize_rows(x, True)
    return _int8_product(quantized, by_token, values, scale, bias, x.dtype)


int8_products.register_fake(_linear_room)


@torch.library.custom_op("scale_rae::int8_product", mutates_args=())
def int8_product(
    x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int8 tokens [..., K], each with a scale [..., 1], times int8 weights with a scale [N, 1] per row: [..., N] in `dtype`."""
    return _int8_product(x, x_scale, values, scale, bias, dtype)


@int8_product.register_fake
def _(x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(values)), dtype=dtype)


def _int8_product(
    x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    (rows, inputs), outputs = tokens.shape, len(values)
    by_token = x_scale.reshape(-1).contiguous()
    if rows <= FEW or inputs % 16:  # rows of tensor descriptors are multiples of 16 bytes
        parts = [
            _few(t, s, values, scale, bias, dtype)
            for t, s in zip(torch.split(tokens, FEW), torch.split(by_token, FEW), strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], outputs)
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    tile = (128, 256, 128) if rows > SOME else (128, 128, 128)
    with torch.cuda.device(x.device):
        _int8_kernel[(triton.cdiv(rows, tile[0]), triton.cdiv(outputs, tile[1]))](
            TensorDescriptor.from_tensor(tokens, [tile[0], tile[2]]),
            by_token,
            TensorDescriptor.from_tensor(values, [tile[1], tile[2]]),
            scale,
            bias,
            out,
            rows,
            outputs,
            inputs,
            ROWS=tile[0],
            OUTPUTS=tile[1],
            INPUTS=tile[2],
            STAGES=4,
            num_warps=8,
        )
    return out.view(*x.shape[:-1], outputs)
