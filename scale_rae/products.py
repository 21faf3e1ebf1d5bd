"""Triton products with quantised weights, for NVIDIA GPUs. The forms of weights are those of quantization.py.

- A few rows, as in decoding: reading the weights takes longest, so a kernel converts them as it reads them.
- More rows: one kernel converts the weights, and cuBLAS multiplies. (A kernel that converts tiles of weights on their way to the
  tensor cores was no faster at any size from 256 to 2,048 rows, and mostly slower: each tile of outputs converts them anew.)
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
def _dequantize_kernel(
    values, scale, out, outputs, inputs, ROWS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr
):
    """ROWS by WIDTH bytes of weights."""
    TYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    is_row = row < outputs
    if KIND == "nf4":
        inside = is_row & (i < inputs // 2)
        codes = tl.load(values + row * (inputs // 2) + i, mask=inside, other=0, eviction_policy="evict_first")
        by = tl.load(scale + row * (inputs // 64) + i // 32, mask=inside, other=0.0).to(tl.float32)
        low, high = _nf4_values(codes, TYPE)
        at = out + row * inputs + i // 32 * 64 + i % 32
        tl.store(at, (low.to(tl.float32) * by).to(TYPE), mask=inside)
        tl.store(at + 32, (high.to(tl.float32) * by).to(TYPE), mask=inside)
    else:
        inside = is_row & (i < inputs)
        w = tl.load(values + row * inputs + i, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        by = tl.load(scale + row, mask=is_row, other=0.0)
        tl.store(out + row * inputs + i, (w * by).to(TYPE), mask=inside)


# --- launches --------------------------------------------------------------------------------------------------------


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def supports(kind: str, device: torch.device) -> bool:
    """Whether these operators compute a kind's products on an NVIDIA GPU."""
    if kind == "int8-products":
        return _is_hopper(device)
    capability = torch.cuda.get_device_capability(device)
    return capability >= ((8, 9) if kind == "fp8-storage" else (8, 0))


def dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: `QuantizedWeight.dequantize` in one kernel."""
    kind = "nf4" if values.dtype == torch.uint8 else "rows"
    outputs, inputs = len(values), values.shape[1] * (2 if kind == "nf4" else 1)
    out = torch.empty(outputs, inputs, dtype=dtype, device=values.device)
    columns = values.shape[1]  # bytes
    rows, width = (1, 1024) if kind == "nf4" else (4, 2048)
    width = min(width, triton.next_power_of_2(columns))
    with torch.cuda.device(values.device):
        _dequantize_kernel[(triton.cdiv(outputs, rows), triton.cdiv(columns, width))](
            values, scale, out, outputs, inputs, ROWS=rows, WIDTH=width, KIND=kind, num_warps=4
        )
    return out


def _few(
    x: Tensor, x_scale: Tensor | None, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows, inputs = x.shape
    outputs = len(values)
    kind = "nf4" if values.dtype == torch.uint8 else "rows" if x_scale is None else "int8"
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    at_once = max(16, triton.next_power_of_2(rows))
    # As measured on Hopper, down to the sizes of other GPUs' shared memory.
    if outputs > 8192:
        per, columns, warps, stages = 32, 64, 2, 5
    elif kind == "nf4" and inputs > 4096:
        per, columns, warps, stages = 16, 64, 8, 4
    else:
        per, columns, warps, stages = 16, 128 if at_once == 16 else 64, 4, 4
    stages = stages if _is_hopper(x.device) else 2
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
            WHOLE=inputs % ((64 if kind == "nf4" else columns) * warps) == 0,
            num_warps=warps,
            num_stages=stages,
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
    # Tiles so small that two programs share a multiprocessor: one multiplies while the other starts or ends.
    (height, width, depth), stages, warps = (128, 128, 128), 3, 8
    if rows <= SOME and outputs <= 8192:
        width, stages, warps = 64, 4, 4  # more programs
    with torch.cuda.device(x.device):
        _int8_kernel[(triton.cdiv(rows, height), triton.cdiv(outputs, width))](
            TensorDescriptor.from_tensor(tokens, [height, depth]),
            by_token,
            TensorDescriptor.from_tensor(values, [width, depth]),
            scale,
            bias,
            out,
            rows,
            outputs,
            inputs,
            ROWS=height,
            OUTPUTS=width,
            INPUTS=depth,
            STAGES=stages,
            num_warps=warps,
        )
    return out.view(*x.shape[:-1], outputs)
