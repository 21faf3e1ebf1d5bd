"""Triton kernels for what PyTorch's compiler makes less well of the blocks.

- Float8 rows in one pass: each token's row is read once, kept in registers, scaled and written. Compiled, a row's largest
  value and its float8 values are two passes over what it is made from.
- The rotary embedding, whose channel pairs are read as they lie, and once. (Compiled for bfloat16, PyTorch's is as fast.)
- Attention over a picture's tokens, rotation included: they are few enough that a block of queries sees all keys at once.

They are torch operators, which compiled blocks call as they are, and need Triton, which comes with PyTorch's CUDA builds.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from scale_rae.dit import NORM_EPS, Attend, Block, Deferred, DiTConfig, RMSNorm, attend
from scale_rae.quantize import FLOAT8, LARGEST, LEAST, Float8Linear, Quantized

_log = logging.getLogger("scale_rae")


@triton.jit
def _store_quantized(values, out, scale, row, i, inside, width, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    largest = tl.maximum(tl.max(tl.abs(values), axis=0), LEAST)
    tl.store(scale + row, largest / LARGEST)
    # What rounding brings beyond the largest, the conversion brings back; NaN stays NaN, which tl.minimum would hide.
    tl.store(out + row * width + i, (values * (LARGEST / largest)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rows_kernel(x, out, scale, width, BLOCK: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    values = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(values, out, scale, row, i, inside, width, LARGEST, LEAST)


@triton.jit
def _swiglu(x, i, inside, width):
    gate = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + width + i, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * value


@triton.jit
def _swiglu_kernel(
    x, out, scale, width, MOST: tl.constexpr, REST: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr
):
    # A row is a power of two and a rest: 5504 = 4096 + 1408 takes 6144 lanes so, and 8192 as one.
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MOST)
    values = _swiglu(x + row * 2 * width, i, i < width, width)
    largest = tl.max(tl.abs(values), axis=0)
    if REST > 0:
        j = MOST + tl.arange(0, REST)
        others = _swiglu(x + row * 2 * width, j, j < width, width)
        largest = tl.maximum(largest, tl.max(tl.abs(others), axis=0))
    largest = tl.maximum(largest, LEAST)
    tl.store(scale + row, largest / LARGEST)
    factor = LARGEST / largest
    tl.store(out + row * width + i, (values * factor).to(out.dtype.element_ty), mask=i < width)
    if REST > 0:
        tl.store(out + row * width + j, (others * factor).to(out.dtype.element_ty), mask=j < width)


@triton.jit
def _rotate_kernel(x, cos, sin, out, x_row, x_token, tokens, width, head, BLOCK: tl.constexpr):
    """A token's channels [width], heads of `head` side by side; x may lie in larger rows, out does not."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    given = tl.load(x + token // tokens * x_row + token % tokens * x_token + i, mask=inside, other=0.0).to(tl.float32)
    x0, x1 = tl.split(given.reshape(BLOCK // 2, 2))
    table = token % tokens * (head // 2) + tl.arange(0, BLOCK // 2) % (head // 2)
    c, s = tl.load(cos + table), tl.load(sin + table)
    rotated = tl.join(x0 * c - x1 * s, x1 * c + x0 * s).reshape(BLOCK)
    tl.store(out + token * width + i, rotated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_kernel(
    x,
    update,
    gate,
    shift,
    factor,
    weight,
    x_out,
    out,
    scale,
    first,
    tokens,
    each,
    gate_stride,
    modulation_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + first
    place = row // tokens // each * tokens + row % tokens  # of a prompt that has `each` images
    i = tl.arange(0, BLOCK)
    inside = i < width
    h = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(update + row * width + i, mask=inside, other=0.0).to(tl.float32)
    h += tl.load(gate + place * gate_stride + i, mask=inside, other=0.0).to(tl.float32) * added
    rounded = h.to(x_out.dtype.element_ty)
    tl.store(x_out + row * width + i, rounded, mask=inside)
    h = rounded.to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, axis=0) / width + eps)
    h *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    h *= 1.0 + tl.load(factor + place * modulation_stride + i, mask=inside, other=0.0).to(tl.float32)
    h += tl.load(shift + place * modulation_stride + i, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(h, out, scale, row, i, inside, width, LARGEST, LEAST)


@triton.jit
def _rotated(x, cos, sin, token, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Rows x [ROWS, HEAD] at places `token` of the tables."""
    x0, x1 = tl.split(x.to(tl.float32).reshape(ROWS, HEAD // 2, 2))
    at = token[:, None] * (HEAD // 2) + tl.arange(0, HEAD // 2)[None, :]
    c, s = tl.load(cos + at), tl.load(sin + at)
    return tl.join(x0 * c - x1 * s, x1 * c + x0 * s).reshape(ROWS, HEAD)


@triton.jit
def _attend_kernel(
    qkv, cos, sin, out, tokens, heads, factor, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr
):
    image = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    width = heads * HEAD
    channel = head * HEAD + tl.arange(0, HEAD)[None, :]
    start = qkv + image.to(tl.int64) * tokens * 3 * width
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    is_row, is_key = row < tokens, key < tokens
    row, key = tl.where(is_row, row, 0), tl.where(is_key, key, 0)  # what there is not, is read elsewhere and left out
    k = _rotated(tl.load(start + width + key[:, None] * 3 * width + channel), cos, sin, key, KEYS, HEAD)
    q = _rotated(tl.load(start + row[:, None] * 3 * width + channel), cos, sin, row, ROWS, HEAD) * factor
    scores = tl.dot(q.to(out.dtype.element_ty), tl.trans(k.to(out.dtype.element_ty)))
    scores = tl.where(is_key[None, :], scores, -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    total = tl.sum(weights, axis=1)
    v = tl.load(start + 2 * width + key[:, None] * 3 * width + channel)
    seen = tl.dot(weights.to(out.dtype.element_ty), v) / total[:, None]
    place = out + (image.to(tl.int64) * tokens + row[:, None]) * width + channel
    tl.store(place, seen.to(out.dtype.element_ty), mask=is_row[:, None])


def _sizes(width: int) -> dict[str, int | float]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8, "LARGEST": LARGEST, "LEAST": LEAST}


def _empty_rows(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    values = torch.empty((*x.shape[:-1], width), dtype=FLOAT8, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


@torch.library.custom_op("scale_rae::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale) of `quantize.quantize` for rows [..., K]."""
    x = x.contiguous()
    width = x.shape[-1]
    values, scale = _empty_rows(x, width)
    with torch.cuda.device(x.device):
        _rows_kernel[(x.numel() // width,)](x, values, scale, width, **_sizes(width))
    return values, scale


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_rows(x, x.shape[-1])


@torch.library.custom_op("scale_rae::quantize_swiglu", mutates_args=())
def quantize_swiglu(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale) of SiLU(gate) · value, for gate and value side by side in [..., 2 K]."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    values, scale = _empty_rows(x, width)
    sizes = _sizes(width)
    most = sizes.pop("BLOCK")
    if most > width:
        most //= 2
    rest = triton.next_power_of_2(width - most) if width > most else 0
    with torch.cuda.device(x.device):
        _swiglu_kernel[(x.numel() // x.shape[-1],)](x, values, scale, width, MOST=most, REST=rest, **sizes)
    return values, scale


@quantize_swiglu.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_rows(x, x.shape[-1] // 2)


@torch.library.custom_op("scale_rae::quantize_normed", mutates_args=())
def quantize_normed(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    null_gate: Tensor | None,
    shift: Tensor,
    factor: Tensor,
    null_shift: Tensor | None,
    null_factor: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', values, scale): x' = x + gate · update, and what is made of norm(x') · (1 + factor) + shift, float8 by rows.

    x, update [B, L, D]; gate, shift, factor [P, L, D] of prompts with as many images each, the last axis of them dense. With
    the null branch's, each [D], the second half of x is the null branch's.
    """
    x, update = x.contiguous(), update.contiguous()
    images, tokens, width = x.shape
    conditional = images if null_gate is None else images // 2
    each = conditional // len(gate)
    x_out = torch.empty_like(x)
    values, scale = _empty_rows(x, width)
    with torch.cuda.device(x.device):
        gates, shifts, factors = gate.flatten(0, -2), shift.flatten(0, -2), factor.flatten(0, -2)
        if shifts.stride(0) != factors.stride(0) or each * len(gate) != conditional or len(gate) != len(shift):
            raise ValueError("the modulations must be of one tensor, and their prompts have equally many images")
        common = (weight, x_out, values, scale)
        sizes = _sizes(width)
        strides = (gates.stride(0), shifts.stride(0))
        rows = conditional * tokens
        _norm_kernel[(rows,)](
            x, update, gates, shifts, factors, *common, 0, tokens, each, *strides, width, eps, **sizes
        )
        if null_gate is not None:
            _norm_kernel[(rows,)](
                x, update, null_gate, null_shift, null_factor, *common, rows, tokens, each, 0, 0, width, eps, **sizes
            )
    return x_out, values, scale


@quantize_normed.register_fake
def _(x: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x.contiguous()), *_empty_rows(x, x.shape[-1])


def of_pairs(table: Tensor) -> Tensor:
    """A rotary table [L, head_dim] with each pair's angle once: [L, head_dim / 2]."""
    return table[:, ::2].contiguous()


@torch.library.custom_op("scale_rae::rotate_pairs", mutates_args=())
def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`dit.rotate` of x [B, L, heads, head_dim], whose last two axes are dense, by `of_pairs` of the tables."""
    batch, tokens, heads, head = x.shape
    if x.stride(3) != 1 or x.stride(2) != head:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(heads * head)
    with torch.cuda.device(x.device):
        _rotate_kernel[(batch * tokens,)](
            x, cos, sin, out, x.stride(0), x.stride(1), tokens, heads * head, head, BLOCK=block, num_warps=4
        )
    return out


@rotate_pairs.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether Triton works here: it needs a C compiler. Where not, says so, and what is slower without."""
    try:
        with torch.inference_mode():
            rotate_pairs(torch.zeros(1, 1, 1, 64, device=device), *torch.zeros(2, 1, 32, device=device))
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        _log.warning(
            "Triton does not work on %s (%s): what is not compiled is slower, compiling will fail", device, reason
        )
        return False
    return True


MOST_KEYS = 256  # that a block of queries sees at once; the published networks' number
# Queries of all heads. One image of the 2.4B network has 8192, and guidance has two of each image. Measured with that network.
_SMALL_BLOCK_ROWS = 1 << 14  # up to which blocks of 64 fill a GPU better than blocks of 128
_OWN_ROWS = 1 << 15  # up to which rotating while reading makes up for what cuDNN's kernel does better
_HEADS = (16, 32, 64)  # channels of a head


@torch.library.custom_op("scale_rae::attend_pairs", mutates_args=())
def attend_pairs(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """`dit.attend` in one kernel, for 16-bit floats and sizes for which `attention_fits`, by `of_pairs` of the tables."""
    qkv = qkv.contiguous()
    batch, tokens, width = qkv.shape
    head = width // 3 // heads
    out = torch.empty((batch, tokens, width // 3), dtype=qkv.dtype, device=qkv.device)
    factor = math.log2(math.e) / math.sqrt(head)
    keys = max(16, triton.next_power_of_2(tokens))
    rows = 64 if batch * heads * tokens <= _SMALL_BLOCK_ROWS else 128
    with torch.cuda.device(qkv.device):
        _attend_kernel[(triton.cdiv(tokens, rows), batch * heads)](
            qkv, cos, sin, out, tokens, heads, factor, ROWS=rows, KEYS=keys, HEAD=head, num_warps=4 if rows == 64 else 8
        )
    return out


@attend_pairs.register_fake
def _(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # By name, since code compiled with PyTorch's own choice is kept under the same key whatever that choice was.
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return out


def attend_flash(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """`dit.attend` with its pairs rotated here, by `of_pairs` of the tables."""
    return attend(qkv, heads, cos, sin, rotate_pairs)


def attend_cudnn(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """And with cuDNN's attention, for sizes for which `cudnn_fits`."""
    return attend(qkv, heads, cos, sin, rotate_pairs, _cudnn_attention)


def attend_by_size(larger: Attend) -> Attend:
    """Our attention for a few images, `larger` for more."""

    def run(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        few = qkv.shape[0] * qkv.shape[1] * heads <= _OWN_ROWS
        return (attend_pairs if few else larger)(qkv, heads, cos, sin)

    return run


def attention_fits(config: DiTConfig, dtype: torch.dtype) -> bool:
    """Whether `attend_pairs` takes a network's sizes."""
    return dtype != torch.float32 and config.tokens <= MOST_KEYS and config.width // config.heads in _HEADS


def cudnn_fits(config: DiTConfig, dtype: torch.dtype) -> bool:
    """Whether `attend_cudnn` takes a network's sizes."""
    head = config.width // config.heads
    return torch.backends.cudnn.is_available() and dtype != torch.float32 and head % 8 == 0 and head <= 128


def plain_block(attend: Attend) -> Callable[..., Deferred]:
    """`Block.deferred` that attends so."""

    def run(
        block: Block, before: Deferred, modulation: Tensor, cos: Tensor, sin: Tensor, null: Tensor | None = None
    ) -> Deferred:
        return block.deferred(before, modulation, cos, sin, null, attend)

    return run


def float8_block(attend: Attend) -> Callable[..., Deferred]:
    """`Block.deferred` after a sum that attends so, for a block whose linears are `Float8Linear`."""

    def run(
        block: Block, before: Deferred, modulation: Tensor, cos: Tensor, sin: Tensor, null: Tensor | None = None
    ) -> Deferred:
        vectors = modulation.chunk(6, dim=-1)
        nulls = null.chunk(6, dim=-1) if null is not None else (None,) * 6
        qkv, proj, w12, w3 = (_float8(x) for x in (block.attn.qkv, block.attn.proj, block.mlp.w12, block.mlp.w3))
        assert before.update is not None
        assert before.modulation is not None
        gate = before.modulation.chunk(6, dim=-1)[5]
        null_gate = None if before.null is None else before.null.chunk(6, dim=-1)[5]
        x, read = _normed(block.norm1, before.x, before.update, (gate, null_gate), vectors[:2], nulls[:2])
        seen = attend(qkv.product(read), block.attn.heads, cos, sin)
        update = proj.product(Quantized(*quantize_rows(seen)))
        x, read = _normed(block.norm2, x, update, (vectors[2], nulls[2]), vectors[3:5], nulls[3:5])
        update = w3.product(Quantized(*quantize_swiglu(w12.product(read))))
        return Deferred(x, update, modulation, null)

    return run


def _float8(linear: object) -> Float8Linear:
    assert isinstance(linear, Float8Linear)
    return linear


def _normed(
    norm: RMSNorm,
    x: Tensor,
    update: Tensor,
    gates: tuple[Tensor, Tensor | None],
    vectors: tuple[Tensor, ...],
    nulls: tuple[Tensor | None, ...],
) -> tuple[Tensor, Quantized]:
    """`quantize_normed` with (shift, factor) of both branches."""
    (shift, factor), (null_shift, null_factor) = vectors, nulls
    x, values, scale = quantize_normed(x, update, *gates, shift, factor, null_shift, null_factor, norm.weight, NORM_EPS)
    return x, Quantized(values, scale)
